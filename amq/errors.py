"""The one exception that a user's input can cause.

Every command turns it into `error: <message>` on stderr and exit status 2; the message names the thing, says what was
expected and what came, and what to do. Anything else that escapes is a defect of ours and keeps its traceback.
"""


class AmqError(ValueError):
    """Bad input or an impossible request, with its remedy in the message."""
