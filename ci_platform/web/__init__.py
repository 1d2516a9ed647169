"""Web pages: templates, static files, page handlers."""
