"""Chats: messages and tools to a prompt, and the model's text back to messages and tool calls."""
