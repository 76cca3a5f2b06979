"""Patterns over key paths: globs with `**` for levels, and regular expressions."""

from __future__ import annotations

import functools
import re

_PREFIX = "params/"
_REPEAT = re.compile(r"#\d+$")


def pattern_matches(pattern: str | re.Pattern[str], key: str) -> bool:
    """Whether a key path matches a pattern.

    Globs: `**` is zero or more levels; `*` any characters of one level, `?` one character, `[ab]`
    or `[!ab]` one of a set. Compiled regular expressions must match the whole key, as globs do.
    A leading `params/` is optional in both pattern and key. The `#k` that marks a repeated site is
    ignored unless the pattern has a `#`.

    >>> pattern_matches("**/mlp/*", "params/encoder/layer_3/mlp/kernel")
    True
    >>> pattern_matches("encoder/*", "encoder/layer_3/kernel")
    False
    >>> pattern_matches(re.compile(r".*layer_[0-3]/.*"), "encoder/layer_3/kernel")
    True
    """
    text = pattern if isinstance(pattern, str) else pattern.pattern
    if "#" not in text:
        key = _REPEAT.sub("", key)
    bare = key.removeprefix(_PREFIX)
    if not isinstance(pattern, str):
        return any(pattern.fullmatch(k) for k in (key, bare, _PREFIX + bare))
    if compile_glob(pattern).fullmatch(key):
        return True
    return compile_glob(pattern.removeprefix(_PREFIX)).fullmatch(bare) is not None


@functools.lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob; see `pattern_matches`.

    Raises:
      ValueError: `**` next to other characters of a level, or a set like `[z-a]`.

    >>> bool(compile_glob("a/**/b").fullmatch("a/b"))
    True
    """
    regex, open_level = "", False  # open_level: the next level needs a separator
    levels = pattern.split("/")
    levels = [p for i, p in enumerate(levels) if p != "**" or levels[i - 1 : i] != ["**"]]
    for i, level in enumerate(levels):
        last = i == len(levels) - 1
        if level == "**":
            if last:
                regex += "(?:/.*)?" if open_level else ".*"
            else:
                regex += ("/" if open_level else "") + "(?:[^/]*/)*"
            open_level = False
        else:
            if "**" in level:
                raise ValueError(
                    f"pattern {pattern!r}: `**` matches whole levels only, as in 'a/**/b'"
                )
            regex += ("/" if open_level else "") + _level(level)
            open_level = True
    try:
        return re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None


def _level(glob: str) -> str:
    out, i = "", 0
    while i < len(glob):
        c = glob[i]
        i += 1
        if c == "*":
            out += "[^/]*"
        elif c == "?":
            out += "[^/]"
        elif c == "[" and (end := glob.find("]", i + 1 + (glob[i : i + 1] == "!"))) > 0:
            members = glob[i:end]
            negated = members.startswith("!")
            escaped = (c if c == "-" else re.escape(c) for c in members[negated:])
            out += f"[{'^/' if negated else ''}{''.join(escaped)}]"
            i = end + 1
        else:
            out += re.escape(c)
    return out
