"""The app's entry for people and for a Hub Space: `python app.py`. `cai-nb app` does the same with options.

CAI_RUN names a run folder; without it, the mini models that come with the package answer. A Space sets the host and port.
"""
import os

from cai_nb.app import serve

if __name__ == "__main__":
    serve(
        run=os.environ.get("CAI_RUN") or None,
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    )
