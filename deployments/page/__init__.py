"""The web page: playground, race and cluster."""
