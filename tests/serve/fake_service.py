"""A stand-in for an engine or a gateway: answers 503 and then 200, starts a grandchild, dies when told to.

Run as a script with one JSON argument. Standard library only, so that it starts at once.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
PLAIN = "import time; time.sleep(600)"


def main(options):
    if options.get("refuse"):
        sys.stderr.write(f"noise\nerror: {options['refuse']}\n")
        return 2
    if options.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", STUBBORN if options.get("stubborn") else PLAIN])
    with open(options["pids"], "w") as file:
        json.dump([os.getpid(), grandchild.pid], file)
    ready_at = time.monotonic() + options.get("delay", 0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            ready = time.monotonic() >= ready_at
            body = json.dumps({"detail": "the self-test is running"}).encode()
            self.send_response(200 if ready else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    if "dies_after" in options:
        # Without stopping the grandchild, as an engine that crashes would.
        threading.Timer(options["dies_after"], os._exit, [7]).start()
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    HTTPServer(("127.0.0.1", options["port"]), Handler).serve_forever()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
