"""Measures serving stacks: plans, engines, cases, a server's client."""
