"""The HTML pages of the report and the map."""
