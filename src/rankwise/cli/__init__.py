"""One thin file a verb; the only room that prints."""
