"""Launchers of several hosts: which one this is, their rendezvous, and their messages."""
