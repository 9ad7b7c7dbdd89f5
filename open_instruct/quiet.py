"""Silences the libraries' messages that tell a user of this project nothing. Import it before they are imported."""

import logging
import warnings

logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional CPU kernel of bitsandbytes is missing
warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
# A head that shares the embedding's weight is given one of its own where an adapter is merged.
warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
warnings.filterwarnings(
    "ignore", message="`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
)  # the new names are not in transformers 5.0


def silence_transformers() -> None:
    """Leave only errors of transformers, and no bar for loading weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
