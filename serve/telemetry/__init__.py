"""How it goes: metrics of every node, status, health, a log line a request, dashboards."""
