"""What a person sees on the terminal while training."""
import sys
import time

from utils.errors import rank


def show_config(**figures):
    """Print a two-column table on rank 0."""
    if rank() == 0:
        width = max(map(len, figures))
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in figures.items()), flush=True)


class ProgressLine:
    """One line, redrawn in place twice a second on a terminal, printed every half minute into a log."""

    def __init__(self, title, steps, first_step=0):
        self.title, self.steps, self.first_step = title, steps, first_step
        self.terminal = sys.stdout.isatty()
        self.begin = self.shown = time.monotonic()

    def show(self, step, images, describe):
        """describe() reads figures off the device, so it is only called when the line is due."""
        now = time.monotonic()
        if rank() or now - self.shown < (0.5 if self.terminal else 30):
            return
        self.shown = now
        done = step - self.first_step
        left = time.strftime("%H:%M:%S", time.gmtime((now - self.begin) / done * (self.steps - step)))
        text = f"{self.title} {step}/{self.steps} {describe()} {images * done / (now - self.begin):.0f} images/s {left} left"
        print(f"\r{text}\033[K" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def clear(self):
        if self.terminal and not rank():
            print("\r\033[K", end="", flush=True)
