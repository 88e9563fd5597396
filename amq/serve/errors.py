"""`ApiError`: what a client is told, in OpenAI's shape."""

from __future__ import annotations

from amq.serve.responses import ErrorBody, ErrorDetails, TypedResponse


class ApiError(Exception):
    """An error that the client sees: HTTP status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> ErrorBody:
        return ErrorBody(ErrorDetails(self.message, self.kind, self.param, self.code))

    def response(self) -> TypedResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return TypedResponse(self.body(), self.status, headers)


class Gone(ApiError):
    """Made anew each time: an exception keeps the frames that it passed through, and with them the request."""

    def __init__(self) -> None:
        super().__init__(499, "the client left")
