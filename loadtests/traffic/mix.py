"""A mix of clients for load tests, started by ``python -m loadtests.load``.

    locust --headless --locustfile loadtests/traffic/mix.py --host URL --users 14 --run-time 30s

Seven kinds of clients: everyday questions, questions to be refused, bursts, long prompts, readers who take
their time, clients who leave, and short questions from many tenants. ``MIX_FILE`` names a JSON file with
``prompts`` (lists ``benign``, ``harmful``, ``long``), ``keys`` (API keys, one for each tenant), ``model``,
``mode`` (``off``, ``observe``, ``enforce``: an answer that does not fit it counts as a failure), ``tokens``
and ``pace``. With a pace each client begins a request every so many seconds however long answers take, as
long as they take less: an open loop. Without one it begins the next when the last has ended: a closed one.
"""

import itertools
import json
import os
import random
import time
from pathlib import Path

import gevent
from locust import HttpUser, constant, constant_pacing, task

MIX = json.loads(Path(os.environ["MIX_FILE"]).read_text("utf-8"))
KEYS = itertools.cycle(MIX["keys"])
PACE = MIX["pace"]
EXPECTED = {
    ("off", False): None,
    ("off", True): None,
    ("observe", False): "pass",
    ("observe", True): "pass",
    ("enforce", False): "pass",
    ("enforce", True): "refuse",
}
"""The guard's action by mode and whether the prompt is harmful. Nobody scored the long prompts beforehand."""


def says(line: bytes) -> bool:
    """Whether a line of a stream holds text."""
    if not line.startswith(b"data: {"):
        return False
    return any(choice["delta"].get("content") for choice in json.loads(line[6:]).get("choices", ()))


class Client(HttpUser):
    """One client of one tenant."""

    abstract = True
    wait_time = constant_pacing(PACE) if PACE else constant(0)
    kind = "benign"
    pause = 0.0
    """Seconds between two lines that it reads."""
    leaves = False
    """Whether it goes after the first text."""

    def on_start(self) -> None:
        """Take a key."""
        self.headers = {"Authorization": f"Bearer {next(KEYS)}"}

    @task
    def turn(self) -> None:
        """One request."""
        self.ask()

    def ask(self) -> None:
        """Send one streamed request, and read as this client reads."""
        body = {
            "model": MIX["model"],
            "messages": [{"role": "user", "content": random.choice(MIX["prompts"][self.kind])}],
            "max_tokens": MIX["tokens"],
            "temperature": 0,
            "stream": True,
        }
        name, began, ended = type(self).__name__, time.perf_counter(), False
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            headers=self.headers,
            name=name,
            stream=True,
            timeout=60,
            catch_response=True,
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            action = answer.headers.get("x-guard-action")
            expected = EXPECTED[MIX["mode"], self.kind == "harmful"]
            if action != expected and not (self.kind == "long" and expected and action):
                answer.failure(f"the guard's action was {action}")
                return
            first = None
            for line in answer.iter_lines():
                if first is None and says(line):
                    first = 1e3 * (time.perf_counter() - began)
                    self.note(name, first)
                    if self.leaves:
                        answer.close()
                        return
                ended |= line.endswith(b"[DONE]")
                if self.pause:
                    gevent.sleep(self.pause)
            if not ended:
                answer.failure("the stream broke off")

    def note(self, name: str, milliseconds: float) -> None:
        """Enter the time to the first text, which Locust does not know of."""
        self.environment.events.request.fire(
            request_type="FIRST",
            name=name,
            response_time=milliseconds,
            response_length=0,
            exception=None,
            context={},
        )


class Everyday(Client):
    """Everyday questions."""

    weight = 4


class Unwelcome(Client):
    """Questions that the guard refuses."""

    weight = 2
    kind = "harmful"


class Tenant(Client):
    """Everyday questions, each from the next of many tenants."""

    weight = 2

    def ask(self) -> None:
        """The same under another key."""
        self.headers = {"Authorization": f"Bearer {next(KEYS)}"}
        super().ask()


class Burst(Client):
    """Six questions at one time, then a pause of a second."""

    weight = 1

    def ask(self) -> None:
        """All six."""
        gevent.joinall([gevent.spawn(super(Burst, self).ask) for _ in range(6)], timeout=60)
        gevent.sleep(1)


class LongPrompt(Client):
    """Prompts close to the longest that the model takes."""

    weight = 2
    kind = "long"


class SlowReader(Client):
    """Takes its time between two lines."""

    weight = 1
    pause = 0.05


class Leaver(Client):
    """Goes at the first word."""

    weight = 2
    leaves = True
