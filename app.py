"""The app's entry for people and for a Hub Space: `python app.py`. `cai-nb app` does the same with options.

CAI_RUN names a run folder; without it, the mini models that come with the package answer. CAI_FOLDER names the folder
in which votes and models trained in the app are kept; without it, nothing is kept. CAI_AUTH is user:password. A Space
sets the host and port.
"""
import os

try:
    import spaces  # noqa: F401 (a Space with ZeroGPU wants this before PyTorch)
except ImportError:
    pass

from cai_nb.app.server import serve

if __name__ == "__main__":
    serve(
        run=os.environ.get("CAI_RUN") or None,
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        folder=os.environ.get("CAI_FOLDER") or None,
        auth=os.environ.get("CAI_AUTH"),
        root_path=os.environ.get("GRADIO_ROOT_PATH") or None,
    )
