"""Demonstration traffic: mostly everyday questions, some that a guard should refuse, streamed and not.

    locust --headless --locustfile loadtests/traffic/locustfile.py --host http://localhost:8080 --run-time 10m

The unwelcome questions were chosen because the lab model's bundle refuses them (13 of 20 tried): they fill a
dashboard and measure nothing.

API keys come from files in ``NEURONGUARD_CLIENT_KEYS`` (default ``/run/secrets/client``). An answer without a
verdict of the guard counts as a failure.
"""

import json
import os
import random
from pathlib import Path

from locust import FastHttpUser, between, task

KEYS = Path(os.environ.get("NEURONGUARD_CLIENT_KEYS", "/run/secrets/client"))
PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text("utf-8"))
VERDICTS = ("pass", "tag", "refuse", "checked")


class Client(FastHttpUser):
    """One client, who waits a little between requests."""

    abstract = True
    wait_time = between(0.5, 2.0)
    network_timeout = 60.0
    key_file = "api-key"

    def on_start(self) -> None:
        """Read the key and ask which model is served."""
        self.headers = {"Authorization": f"Bearer {(KEYS / self.key_file).read_text('utf-8').strip()}"}
        with self.client.get("/v1/models", headers=self.headers, catch_response=True) as response:
            self.model = response.json()["data"][0]["id"]

    @task(6)
    def everyday(self) -> None:
        """A question that should be answered."""
        self.ask("everyday")

    @task(2)
    def everyday_stream(self) -> None:
        """The same, streamed."""
        self.ask("everyday", stream=True)

    @task(2)
    def unwelcome(self) -> None:
        """A question that should be refused."""
        self.ask("unwelcome")

    @task(1)
    def unwelcome_stream(self) -> None:
        """The same, streamed."""
        self.ask("unwelcome", stream=True)

    def ask(self, kind: str, stream: bool = False) -> None:
        """Send one chat request and read its answer to the end."""
        prompt = random.choice(PROMPTS[kind])
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 48,
            "stream": stream,
        }
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            headers=self.headers,
            name=f"{kind}, {'stream' if stream else 'whole'}",
            catch_response=True,
            stream=stream,
        ) as response:
            if stream and response.status_code == 200:
                ended = response.content.rstrip().endswith(b"data: [DONE]")
                if not ended:
                    response.failure("the stream broke off")
            if response.status_code == 200 and response.headers.get("x-guard-action") not in VERDICTS:
                response.failure("no verdict came with the answer")


class Guarded(Client):
    """Under a policy that enforces."""

    weight = 3


class Observed(Client):
    """Under a policy that only observes."""

    weight = 1
    key_file = "api-key-observe"
