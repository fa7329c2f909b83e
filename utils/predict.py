"""Name what is in pictures, with a trained run: python -m utils.predict RUN PICTURE…

From Python, in any folder, with the project's folder on sys.path:

    from utils.predict import Classifier
    classify = Classifier("/path/to/project/logs/…")
    classify("picture.jpg")             # [(class name, probability), …], the five best in order
    classify.features("picture.jpg")    # the vector that the network's head sees
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import json
import sys

from utils import task
from utils.plumbing.errors import printable
from utils.trained import (
    Classifier,
    add_pictures,
    begin_command,
    describe_prediction,
    find_pictures,
)


def print_prediction(path, prediction, as_json):
    """Print a prediction, or on standard error why there is none (in JSON: as 'error')."""
    unreadable = isinstance(prediction, str)
    if as_json:
        found = {"error": prediction} if unreadable else task.prediction_json(prediction)
        print(json.dumps({"picture": path, **found}), flush=True)
    elif unreadable:
        print(printable(f"{path}: {prediction}"), file=sys.stderr, flush=True)
    else:
        print(printable(f"{path}: {describe_prediction(prediction)}"), flush=True)


def main(arguments=None):
    parser = begin_command("predict", __doc__)
    add_pictures(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    classifier = Classifier(options.run, options.weights, options.mirrored)
    failed = False
    for path, prediction in classifier.predictions(find_pictures(options.pictures)):
        failed = failed or isinstance(prediction, str)
        print_prediction(path, prediction, options.json)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
