"""Takes what an OTLP exporter sends and prints it, one JSON object a line,
decoded by OpenTelemetry's own definitions. Fields they do not know are an error.

The first line is the port. `--fail N` answers the first N requests with 503.
"""

import argparse
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from google.protobuf.json_format import MessageToDict
from google.protobuf.unknown_fields import UnknownFieldSet
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

# Requests are served side by side, lines are not written so.
LINE = threading.Lock()
KINDS = {
    "/v1/traces": (ExportTraceServiceRequest, ExportTraceServiceResponse),
    "/v1/metrics": (ExportMetricsServiceRequest, ExportMetricsServiceResponse),
}


def unknown(message):
    """Whether `message` or one within it has fields without a definition."""
    if len(UnknownFieldSet(message)):
        return True
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if not hasattr(value, "ListFields") else [value]:
                if unknown(inner):
                    return True
    return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    left = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if Handler.left > 0:
            Handler.left -= 1
            return self.reply(503, b"")
        if self.headers["content-type"] != "application/x-protobuf":
            return self.reply(415, b"")
        request, response = KINDS[self.path]
        message = request.FromString(body)
        seen = {
            "path": self.path,
            "headers": {k.lower(): v for k, v in self.headers.items()},
            "unknown": unknown(message),
            "message": MessageToDict(message),
        }
        with LINE:
            print(json.dumps(seen), flush=True)
        self.reply(200, response().SerializeToString())

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--fail", type=int, default=0)
    Handler.left = args.parse_args().fail
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    sys.stdout.flush()
    server.serve_forever()


main()
