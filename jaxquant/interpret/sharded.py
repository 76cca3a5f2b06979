"""`shard_map` with quantized operands: each is split like the array it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import PartitionSpec

from jaxquant.interpret import _compat, placed
from jaxquant.interpret.values import Facts, Value
from jaxquant.qtensor import QTensor, is_fake_quant, is_qtensor, with_plain_scales

if TYPE_CHECKING:
    from jaxquant.interpret.evaluate import Interpreter


def _parts(mesh: Any, entry: Any) -> int:
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


def _local(q: QTensor, mesh: Any, spec: Sequence[Any]) -> QTensor | None:
    """`q` with the static data of one shard; `None` if that would split a group or a byte."""
    nb = len(q.batch)
    full = tuple(spec) + (None,) * (q.ndim - len(spec))
    counts = [_parts(mesh, e) for e in full]
    core = list(q.core)
    blocks = list(q.blocks)
    for at, (merged, block, groups) in enumerate(zip(q.axes, q.blocks, q.groups, strict=True)):
        split = [counts[nb + len(q.core) + a] for a in merged]
        if any(n != 1 for n in split[1:]):
            return None  # only the outermost of merged axes is contiguous
        n = split[0]
        if n == 1:
            continue
        one_group = groups == 1
        if q.padded[at] != q.storage[at] or q.padded[at] % n or (not one_group and groups % n):
            return None
        if at == len(q.axes) - 1 and q.spec.format.packed and (q.padded[at] // n) % 64:
            return None
        core[merged[0] + len(q.core)] //= n
        blocks[at] = q.padded[at] // n if one_group else block
    calibration = None if q.calibration is None else q.calibration.moved()
    return dataclasses.replace(q, core=tuple(core), blocks=tuple(blocks), calibration=calibration)


def shard_map(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
) -> list[Value]:
    """Enters the body with local `QTensor`s; one that cannot be split evenly is dequantized."""
    p = eqn.params
    jaxpr, consts = _compat.opened(p["jaxpr"])
    mesh = p["mesh"]
    leaves: list[Any] = []
    specs: list[Any] = []
    rebuild: list[Any] = []
    for value, spec in zip(operands, p["in_specs"], strict=True):
        data = with_plain_scales(value.data) if is_qtensor(value.data) else value.data
        local = _local(data, mesh, spec) if is_qtensor(data) else None
        if local is None:
            leaves.append(ip.dense(value, eqn, scope))
            specs.append(spec)
            rebuild.append(None)
            continue
        codes, scales = (placed.storage_spec(data, spec, groups) for groups in (False, True))
        lead = PartitionSpec(*scales[: len(data.batch)])
        parts = {"codes": codes, "scale": scales, "zero_point": scales}
        parts |= {"codebook": scales if data.grouped_codebook else lead, "global_scale": lead}
        if is_fake_quant(data):
            parts["values"] = spec
        names = [name for name in parts if getattr(data, name) is not None]
        leaves.append([getattr(data, name) for name in names])
        specs.append([parts[name] for name in names])
        rebuild.append((local, names))
    facts = [
        dataclasses.replace(v.facts, nonneg=n) for v, n in zip(operands, positive, strict=True)
    ]
    out_facts: list[Facts] = []
    slots = ip.slots.inside(ip.call_path)

    def body(slot_values: list[Any], *shards: Any) -> list[Any]:
        values = []
        for shard, parts, fact in zip(shards, rebuild, facts, strict=True):
            if parts is not None:
                local, names = parts
                shard = dataclasses.replace(local, **dict(zip(names, shard, strict=True)))
            values.append(Value(shard, fact))
        with ip.slots.shutting("a shard_map"):
            out, _ = ip.slots.within(
                slots, slot_values, lambda: ip.run(jaxpr, consts, values, scope)
            )
        out_facts[:] = [v.facts for v in out]
        return [ip.dense(v, eqn, scope) for v in out]

    call = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), *specs),
        out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    out = call(ip.slots.read(slots), *leaves)
    return [
        Value(d, dataclasses.replace(f, origin=None)) for d, f in zip(out, out_facts, strict=True)
    ]
