"""OpenTelemetry export for Serve's tracing: what RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH names (docs/operations.md)."""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def otlp() -> list[SpanProcessor]:
    """A span processor that sends to OTEL_EXPORTER_OTLP_ENDPOINT over OTLP/HTTP. Other OTEL_* variables apply too."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
