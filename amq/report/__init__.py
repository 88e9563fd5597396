"""The report of a search: one HTML page that works offline, and its charts as PNG files."""
