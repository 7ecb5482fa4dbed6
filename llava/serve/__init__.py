"""Talking to a model: in the terminal (cli) and in the browser (gradio_web_server)."""
