"""What Schemathesis is told of the server; loaded by its process, not by the tests'."""

import schemathesis

SHORTEST = 1_000_000  # microseconds


@schemathesis.hook
def before_call(context, case, kwargs):
    """Gives requests the time that an answer takes: to a deadline of 1 microsecond 504 is the right answer.

    So every 5xx remains a fault, 504 included.
    """
    parameters = case.body.get("parameters") if isinstance(case.body, dict) else None
    timeout = parameters.get("timeout") if isinstance(parameters, dict) else None
    if type(timeout) is int and 0 < timeout < SHORTEST:
        case.body["parameters"] = {**parameters, "timeout": SHORTEST}
