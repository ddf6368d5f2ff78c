"""The app: its page, panels, queue, middleware and validation of what clients send."""
