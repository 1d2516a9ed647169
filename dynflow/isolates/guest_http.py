"""`urllib.request` inside of an isolate: its requests go to the host, as those of `fetch` do. Stdlib only."""

from __future__ import annotations

import email.message
import http
import io
import urllib.request
import urllib.response
from collections.abc import Callable
from urllib.error import URLError

from dynflow.errors import OutboundRefusedError
from dynflow.outbound import NO_NETWORK, HttpRequest, HttpResponse

AskNow = Callable[[HttpRequest], HttpResponse]
"""Sends a request and returns when the answer is there: `urlopen` is not async."""


class _HostHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https by asking the host."""

    def http_open(self, request: urllib.request.Request) -> urllib.response.addinfourl:
        """Return the host's answer. Raises URLError."""
        data = request.data
        body = b"" if data is None else data if isinstance(data, bytes) else b"".join(data)  # type: ignore[arg-type]
        asked = HttpRequest(request.full_url, request.get_method(), dict(request.header_items()), body)
        try:
            answer = _ask_now(asked)
        except Exception as error:
            raise URLError(str(error)) from error
        headers = email.message.Message()
        for name, value in answer.headers.items():
            headers[name] = value
        response = urllib.response.addinfourl(io.BytesIO(answer.body), headers, asked.url, answer.status)
        phrases = {status.value: status.phrase for status in http.HTTPStatus}
        response.msg = response.reason = phrases.get(answer.status, "")  # type: ignore[attr-defined]  # as http.client's
        return response

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _make_opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.UnknownHandler(),
        urllib.request.DataHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        _HostHandler(),
    ):
        opener.add_handler(handler)
    return opener


# Made in the zygote, before there is anybody to ask: that is not done again for each isolate.
_opener = _make_opener()


def _nobody(_: HttpRequest) -> HttpResponse:
    raise OutboundRefusedError(NO_NETWORK)


_ask_now: AskNow = _nobody


def install(ask_now: AskNow | None) -> None:
    """Make `urllib.request.urlopen` ask with `ask_now`; None: refuse."""
    global _ask_now  # noqa: PLW0603 - one process, one host
    _ask_now = ask_now or _nobody
    urllib.request.install_opener(_opener)
