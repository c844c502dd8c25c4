"""Pages for people to read, each one HTML file: one template, one stylesheet, one script."""
