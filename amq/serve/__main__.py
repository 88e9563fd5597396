"""`python -m amq.serve MODEL`: loads a model and answers OpenAI's API until it is told to stop."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from amq.serve.settings import ServeCommand, ServeSettings
from amq.util.settings import parse_command, run_command

if TYPE_CHECKING:
    from amq.serve.app import Service

log = logging.getLogger("amq.serve")


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_command(argv, ServeSettings, ServeCommand)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    model = given.pop("model")
    settings = settings_of(given)
    if settings.log_requests:
        log.setLevel(logging.INFO)
    from amq.runtime import load
    from amq.serve import Server, bind, create_app  # says which extra is missing, if it is
    from amq.serve.door import all_keys
    from amq.serve.plan import plan
    from amq.serve.server import url

    all_keys(settings)  # a file that cannot be read is named before the model is loaded

    listener = bind(settings)
    if line := plan(model, settings):
        print(line, file=sys.stderr, flush=True)
    runtime = load(model, **settings.loading)
    app = create_app(runtime, settings)
    app.state.service.prepare()
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection has to look at it again
    line = _line(app.state.service, url(listener))
    server = Server(app, settings, lambda: print(line, file=sys.stderr, flush=True))
    server.run([listener])
    if app.state.service.worker.alive:  # it hangs: an orderly end of the interpreter would wait for it, or crash
        logging.shutdown()
        os._exit(server.status)
    return server.status


def settings_of(given: dict[str, Any]) -> ServeSettings:
    """The command's settings; where its flags name no key, those of AMQ_API_KEY count, commas or newlines between."""
    if "api_key" in given:
        log.warning("--api-key shows the key to everyone on this machine who lists processes: use --api-key-file")
    elif "api_key_file" not in given:
        keys = re.split("[,\n]", os.environ.get("AMQ_API_KEY", ""))
        given = {**given, "api_key": [key.strip() for key in keys if key.strip()]}
    return ServeSettings(**given)


def _line(service: Service, address: str) -> str:
    engine = service.runtime.engine
    size = getattr(engine, "cache_bytes", None)  # an engine of transformers makes its cache as it goes
    memory = "" if size is None else f" ({size / 2**20:.0f} MiB)"
    return (
        f"{engine.banner}; {service.model} at {address}, {engine.max_sequences} slots of at most {engine.context} "
        f"positions, KV cache of {engine.cached_tokens()[1]} positions{memory}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
