"""What charts show: told by their pixels."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils.loss_history import LossHistory
from utils.plumbing.charts import COLOURS, draw_contact_sheet, draw_line_chart, draw_matrix
from utils.task import mistakes


def cells(counts):
    """The blue shade of each cell of a confusion matrix, 0 for white and 1 for full, by rows."""
    number = len(counts)
    image = np.asarray(draw_matrix(np.array(counts), ["" for _ in counts])).astype(float)
    frame = np.argwhere((image == (40, 40, 40)).all(2))
    top, left = frame.min(0) + 1
    cell = min(56, 1000 // number)
    corners = [top + 4 + cell * i for i in range(number)]
    shades = image[np.ix_(corners, [left + 4 + cell * i for i in range(number)])]
    return (255 - shades[..., 0]) / (255 - COLOURS[0][0])


@pytest.fixture
def written(monkeypatch):
    """The texts that Pillow has drawn since, with the place of each."""
    texts = {}
    original = ImageDraw.ImageDraw.text

    def note(draw, place, text, *words, **options):
        texts[text] = place
        return original(draw, place, text, *words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


def test_a_matrix_says_what_its_rows_and_columns_are(written):
    draw_matrix(np.array([[7, 0], [3, 5]]), ["", ""])
    rows, columns = written["rows: true class"], written["columns: predicted class"]
    assert rows[0] == columns[0] and 12 < columns[1] - rows[1] and {"7", "3", "5"} <= {*written}


def test_a_chart_names_its_axes_and_curves(written):
    draw_line_chart([("loss", {"training": [(1, 0.0), (9, 8.0)], "validation": [(9, 7.25)]})])
    assert {"loss", "epoch", "training  (last 8)", "validation  (last 7.25)"} <= {*written}
    assert written["training  (last 8)"][0] + 150 < written["validation  (last 7.25)"][0]
    assert written["loss"][1] < 50 < written["epoch"][1] and {"2", "4", "6", "8"} <= {*written}


def test_a_matrix_is_shaded_by_the_share_of_its_row():
    counts = [[8, 2, 0, 0], [0, 5, 15, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    expected = [[0.8, 0.2, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(cells(counts), expected, atol=0.01)


def test_the_number_of_pictures_stands_in_its_cell():
    image = np.asarray(draw_matrix(np.array([[0, 8], [0, 0]]), ["", ""]))
    full = np.argwhere(image[..., 2] > 50.0 + image[..., 0])
    (top, left), (bottom, right) = full.min(0), full.max(0) + 1
    assert (image[top:bottom, left:right] > 200).all(2).sum() > 5  # it is white


def test_names_stand_beside_their_rows_and_above_their_columns():
    image = np.asarray(draw_matrix(np.ones((2, 2), int), ["ii", "MMMM"]))
    cells = np.argwhere(image[..., 2] > 50.0 + image[..., 0])  # they are blue
    (top, left), (bottom, right) = cells.min(0), cells.max(0) + 1
    ink = (image < 200).all(2)
    beside = ink[top:bottom, : left - 2]
    above = ink[: top - 2, left:right].T
    for names in (beside, above):
        assert 0 < 3 * names[:56].sum() < names[56:].sum()


@pytest.mark.parametrize("values", [[3.0, 2.0, 0.5], [0.1, 0.5, 0.9], [1.0, -2.0, 3.0]])
def test_a_curve_goes_up_with_its_values(values):
    image = np.asarray(draw_line_chart([("loss", {"training": list(enumerate(values, 1))})]))
    chart = image[:366]  # above the legend
    rows, columns = np.nonzero((chart == COLOURS[0]).all(2))
    edges = np.linspace(columns.min() + 4, columns.max() - 4, len(values))
    heights = [-rows[abs(columns - edge) <= 1].mean() for edge in edges]
    assert np.argsort(heights).tolist() == np.argsort(values).tolist()
    shares = (np.array(heights) - min(heights)) / (max(heights) - min(heights))
    expected = (np.array(values) - min(values)) / (max(values) - min(values))
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_each_panel_and_each_curve_has_its_place():
    flat = [(1, 0.5), (2, 0.5)]
    image = np.asarray(
        draw_line_chart([("loss", {"a": flat, "b": [(1, 1), (2, 1)]}), ("top1", {"c": flat})])
    )
    assert image.shape == (420, 1280, 3)
    first, second = image[:366, :640], image[:366, 640:]
    rows = [np.nonzero((first == colour).all(2))[0].mean() for colour in COLOURS[:2]]
    assert rows[1] < rows[0] and (second == COLOURS[0]).all(2).any()
    assert not (second == COLOURS[1]).all(2).any()


def test_the_loss_of_training_and_of_validation_have_their_colours(tmp_path):
    history = LossHistory(tmp_path)
    for epoch in (1, 2):
        history.append_loss({"epoch": epoch, "train_loss": 3.0, "val_loss": 1.0})
    history.write()
    image = np.asarray(Image.open(tmp_path / "epoch_loss.png"))[:366]
    training, validation = (
        np.nonzero((image == colour).all(2))[0].mean() for colour in COLOURS[:2]
    )
    assert training < validation - 100  # a higher place


def test_pictures_stand_in_the_order_of_their_captions():
    import torch

    pictures = [torch.full((4, 4, 3), 25 * i, dtype=torch.uint8) for i in range(10)]
    sheet = np.asarray(draw_contact_sheet(pictures, [str(i) for i in range(10)]))
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 8
    seen = [sheet[i // 8 * height + 52, i % 8 * width + 52, 0] for i in range(10)]
    assert seen == [25 * i for i in range(10)]
    higher = draw_contact_sheet(pictures, ["one\ntwo"] * 10)  # two rows, each a line higher
    assert higher.height - sheet.shape[0] == 2 * 18


def test_the_most_confident_mistakes_come_first():
    import torch

    names = ["a", "b", "c"]
    predictions = [
        [("a", 0.5)], [("b", 0.6)], [("a", 0.9)], [("c", 0.9)], [("b", 0.7)]
    ]  # fmt: skip
    found = mistakes(torch.tensor([0, 0, 1, 2, 2]), predictions, names)
    assert [place for place, _ in found] == [2, 4, 1]
    assert "true: b" in found[0][1] and "predicted: a" in found[0][1] and "90%" in found[0][1]
    assert [
        place for place, _ in mistakes(torch.tensor([0, 0, 1, 2, 2]), predictions, names, 2)
    ] == [2, 4]
