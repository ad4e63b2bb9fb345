"""The session: attach, train in any loop, prove it, save and resume."""
