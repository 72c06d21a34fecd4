"""The numbers of a run as TensorBoard event files, for ``tensorboard --logdir runs``.

The writer is tensorboardX, which needs neither TensorFlow nor PyTorch: ``pip install 'xura[tensorboard]'``.
"""

from xuracore.errors import MissingExtraError


def writer_class():
    """tensorboardX.SummaryWriter; MissingExtraError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboardX", "tensorboard") from None
    return SummaryWriter


class EventLog:
    """Writes the records of a metrics log as scalars named ``split/name``, into files in ``folder``.

    purge_step : on resume, what an earlier process wrote of this step and later ones is shown no more.
    Raises MissingExtraError where the extra is not installed.
    """

    def __init__(self, folder, purge_step=None):
        self._writer = writer_class()(logdir=str(folder), purge_step=purge_step)

    def write(self, record):
        """Every number of ``record`` at its "step"; names with a blank get a ``_`` there."""
        split = record.get("split", "train")
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{split}/{name.replace(' ', '_')}", value, record["step"])

    def close(self):
        """Write what is still held back, and close the file."""
        self._writer.close()
