"""Puts a fused model to use: chat, web page, server, and the fastest way to decode."""
