"""Launchers of several hosts: which one this is, and how they meet and decide together."""
