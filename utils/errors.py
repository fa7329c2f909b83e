"""The one error that a user can mend, and the nearest name for a mistyped one."""
import difflib

TOO_MANY_FILES = "too many open files: raise the limit (ulimit -n 4096), or lower num_workers"
TOO_SMALL = "数据集过小,无法继续进行训练,请扩充数据集。"  # the documented words of the documented ValueError


class UserError(ValueError):
    """Something that the user can mend: shown as one sentence, without a traceback, exit code 1."""


def nearest(name, choices) -> str:
    """' (did you mean …?)' for a mistyped name, or ''."""
    found = difflib.get_close_matches(str(name).lower()[:100], list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def shown(value, length=80) -> str:
    """repr(value), shortened: a message must stay one readable sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to spell a number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= length else text[:length] + "…"
