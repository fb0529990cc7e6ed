"""What a client is told when a request fails, in OpenAI's shape: {"error": {message, type, param, code}}.

ApiError
├── invalid_request / unsupported / context_too_long     400
├── forbidden                                            403
├── unknown_model / unknown_path                         404
├── wrong_method                                         405
├── body_too_large                                       413
├── client_gone                                          499, in logs and metrics only
├── internal                                             500
├── worker_lost / worker_failed / nobody_goes_on         502, or nobody_goes_on as it was refused
├── overloaded / unavailable / draining                  503 with Retry-After
├── too_many_waiting / wake_timed_out / wake_failed      503 with Retry-After
├── not_handed_over                                      503 with Retry-After
├── held / no_room / put_to_sleep                        503 that asks not to try again
├── act_failed                                           409, 500, 503 or 504
└── stalled / took_too_long / act_timed_out              504
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import msgspec

RETRY_AFTER_S = 1
STOPPING = "this frontend is stopping or restarting"


class ApiError(Exception):
    """A failed request. `param` is the field at fault, if one is. With `again` false the same would happen again, and
    clients that try failed requests of this status again by themselves are told not to. `allow` is the header of
    that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        param: str | None = None,
        code: str | None = None,
        again: bool = True,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.again = again
        self.allow = allow

    @property
    def retry_after_s(self) -> int | None:
        return RETRY_AFTER_S if self.status == 503 and self.again else None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, kind="invalid_request_error", param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    return invalid_request(f"{what}; leave out '{param}'", param, "unsupported_parameter")


def context_too_long(prompt_tokens: int | str, context_length: int, field: str) -> ApiError:
    """`prompt_tokens` is text where their number is not known: "at least 70000", say."""
    return invalid_request(
        f"the prompt is {prompt_tokens} tokens long, and with at least one to generate it must fit into this model's "
        f"context of {context_length}; shorten the prompt",
        field,
        "context_length_exceeded",
    )


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, kind="permission_error", code="forbidden")


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    names = sorted(known)
    there = ", ".join(names) or "none"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return ApiError(
        404,
        f"the model {name!r} does not exist here{meant}; models: {there}",
        kind="invalid_request_error",
        param="model",
        code="model_not_found",
    )


def unknown_path(method: str, path: str) -> ApiError:
    return ApiError(404, f"no such path: {method} {path}", kind="invalid_request_error", code="unknown_url")


def wrong_method(method: str, path: str, allowed: str) -> ApiError:
    message = f"{path} is not for {method}; use {allowed}"
    return ApiError(405, message, kind="invalid_request_error", code="method_not_allowed", allow=allowed)


def body_too_large(cap: int) -> ApiError:
    return ApiError(
        413, f"the body is over the cap of {cap} bytes", kind="invalid_request_error", code="body_too_large"
    )


def client_gone() -> ApiError:
    return ApiError(499, "the client closed the connection", kind="client_closed_request", code="client_gone")


def cancelled() -> ApiError:
    return ApiError(499, "the request was cancelled by the operator", kind="cancelled", code="cancelled")


def internal(request_id: str) -> ApiError:
    message = f"an error inside the frontend; its log tells more under request_id {request_id}"
    return ApiError(500, message, kind="server_error", code="internal_error")


def worker_lost(worker: str, reason: str) -> ApiError:
    return ApiError(
        502,
        f"worker {worker} was lost before the answer was complete: {reason}",
        kind="server_error",
        code="worker_lost",
    )


def worker_failed(worker: str, reason: str) -> ApiError:
    return ApiError(502, f"worker {worker} failed this request: {reason}", kind="server_error", code="worker_failed")


def nobody_goes_on(setback: ApiError, refusal: ApiError, *, begun: bool) -> ApiError:
    """`setback` is why the request was placed again, `refusal` why it found no place. What was said before (`begun`)
    makes it the loss of an answer; without that, the client may as well try again.
    """
    if begun:
        message = f"{setback.message}; nobody could go on with it: {refusal.message}"
        return ApiError(setback.status, message, kind=setback.kind, code=setback.code)
    message = f"{refusal.message}; before that, {setback.message}"
    return ApiError(refusal.status, message, kind=refusal.kind, param=refusal.param, code=refusal.code)


def not_handed_over(reason: str) -> ApiError:
    """Under the policy `strict`."""
    message = f"the prompt's KV could not be handed over: {reason}; the policy strict forbids to compute it elsewhere"
    return ApiError(503, message, kind="service_unavailable_error", code="not_handed_over")


def overloaded(limit: int) -> ApiError:
    message = f"{limit} requests are waiting or running, which is this server's limit; try again"
    return ApiError(503, message, kind="overloaded_error", code="overloaded")


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="service_unavailable_error", code="unavailable")


def too_many_waiting(model: str, limit: int) -> ApiError:
    message = f"{limit} requests wait for {model} to wake, which is this server's limit; try again"
    return ApiError(503, message, kind="overloaded_error", code="overloaded")


def wake_timed_out(model: str, seconds: float, doing: str) -> ApiError:
    message = f"{model} did not wake within {seconds:g} s ({doing}); try again"
    return ApiError(503, message, kind="service_unavailable_error", code="wake_timeout")


def wake_failed(model: str, reason: str) -> ApiError:
    message = f"{model} sleeps and can't be woken: {reason}"
    return ApiError(503, message, kind="service_unavailable_error", code="wake_failed")


def held(model: str) -> ApiError:
    message = f"{model} is held asleep, so requests don't wake it; `dynbox wake {model}` does"
    return ApiError(503, message, kind="service_unavailable_error", code="model_held", again=False)


def no_room(model: str, reason: str) -> ApiError:
    """And none that comes by itself: somebody has to make it."""
    message = f"{model} sleeps and can't be woken: {reason}"
    return ApiError(503, message, kind="service_unavailable_error", code="no_room", again=False)


def put_to_sleep(reason: str) -> ApiError:
    """`reason` is the worker's, and begins with "cancelled:"."""
    return ApiError(503, reason, kind="service_unavailable_error", code="cancelled", again=False)


def too_many_acts(limit: int) -> ApiError:
    message = f"{limit} sleeps and wakes are under way, which is this server's limit; try again"
    return ApiError(503, message, kind="overloaded_error", code="overloaded")


def act_timed_out(act: str, model: str, seconds: float) -> ApiError:
    message = f"no word within {seconds:g} s of how the {act} of {model} ended; it may go on, see `dynbox ps`"
    return ApiError(504, message, kind="server_error", code="timeout")


def act_failed(status: int, message: str) -> ApiError:
    kinds = {409: "conflict_error", 503: "service_unavailable_error"}
    codes = {409: "conflict", 503: "unavailable", 504: "timeout"}
    return ApiError(status, message, kind=kinds.get(status, "server_error"), code=codes.get(status, "failed"))


def draining() -> ApiError:
    return ApiError(503, f"{STOPPING}; try again", kind="service_unavailable_error", code="draining")


def stalled(worker: str | None, seconds: float) -> ApiError:
    who = f"worker {worker}" if worker else "the server"
    return ApiError(
        504,
        f"{who} produced nothing for {seconds:g} s; the request was cancelled",
        kind="server_error",
        code="stalled",
    )


def took_too_long(seconds: float) -> ApiError:
    message = (
        f"the request was not done within {seconds:g} s, the most that this server's profile allows (max_generation)"
    )
    return ApiError(504, message, kind="server_error", code="max_generation", again=False)


def slow_client(seconds: float) -> ApiError:
    message = f"the client read nothing for {seconds:g} s"
    return ApiError(499, message, kind="client_closed_request", code="client_gone")
