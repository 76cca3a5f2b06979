"""Reading lowered programs: what is called several times counts several times."""

import re

_FUNCTION = re.compile(
    r"^  func\.func (?:public|private) @(\w+)\(.*?^  \}", re.MULTILINE | re.DOTALL
)
_CALL = re.compile(r"\bcall @(\w+)\(")


def inlined(text: str) -> str:
    """A program's text with the body of each function wherever that is called.

    >>> inlined("no functions")
    'no functions'
    """
    bodies = {found[1]: found[0] for found in _FUNCTION.finditer(text)}
    if "main" not in bodies:
        return text

    def expanded(name: str) -> str:
        lines = []
        for line in bodies[name].splitlines():
            called = _CALL.search(line)
            lines.append(expanded(called[1]) if called and called[1] in bodies else line)
        return "\n".join(lines)

    return expanded("main")
