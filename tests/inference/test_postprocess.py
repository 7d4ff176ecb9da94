"""Post-processing against one detection decoded and pasted at a time, and the laws of its output."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from scipy.fft import idctn

from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.codecs.base import sharpness
from solq_lab.codecs.dct import DCTCodec, zigzag
from solq_lab.inference import postprocess as module
from solq_lab.inference.postprocess import postprocess
from solq_lab.masks import paste_masks
from solq_lab.structures import LayerPrediction

MASK_SIZE, VECTOR_DIM, CLASSES = 16, 20, 4
NAMES = [f"class {channel}" for channel in range(CLASSES)]
SIZES = [(40, 60), (33, 21)]


def random_prediction(queries: int = 12, batch: int = 2) -> LayerPrediction:
    generator = torch.Generator().manual_seed(0)
    return LayerPrediction(
        torch.randn(batch, queries, CLASSES, generator=generator),
        0.2 + 0.5 * torch.rand(batch, queries, 4, generator=generator),
        torch.randn(batch, queries, VECTOR_DIM, generator=generator),
    )


def decode_plainly(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A vector's reconstruction and its mask."""
    spectrum = np.zeros(MASK_SIZE**2)
    spectrum[zigzag(MASK_SIZE)[:VECTOR_DIM].numpy()] = vector
    decoded = idctn(spectrum.reshape(MASK_SIZE, MASK_SIZE), norm="ortho")
    return decoded, decoded > (decoded.max() + decoded.min()) / 2


def certainty(vector: np.ndarray) -> float:
    decoded, mask = decode_plainly(vector)
    decoded = decoded.clip(0, 1)
    return decoded[mask].mean() * (1 - decoded[~mask]).mean()


@pytest.mark.parametrize("rescore", ["none", "sharpness"])
def test_each_detection_equals_its_own_decode_and_paste(rescore):
    prediction = random_prediction()
    found = postprocess(prediction, SIZES, DCTCodec(MASK_SIZE, VECTOR_DIM), top_k=9, class_names=NAMES, rescore=rescore)
    for image, (height, width) in enumerate(SIZES):
        scores = prediction.logits[image].sigmoid().flatten()
        order = np.argsort(-scores.numpy())[:9]
        if rescore == "sharpness":  # of the same nine
            certainties = [certainty(vector.numpy()) for vector in prediction.vectors[image]]
            scores = scores * torch.tensor(certainties, dtype=torch.float32).repeat_interleave(CLASSES)
            before, order = order, order[np.argsort(-scores.numpy()[order])]
            assert (order != before).any()
        detections = found[image]
        assert detections.queries.tolist() == (order // CLASSES).tolist()
        assert detections.labels.tolist() == (order % CLASSES).tolist()
        assert detections.names == [NAMES[label] for label in order % CLASSES]
        rounding = {"rel": 1e-5} if rescore == "sharpness" else {"rel": 0, "abs": 0}
        assert detections.scores.tolist() == pytest.approx(scores[torch.from_numpy(order)].tolist(), **rounding)
        for row, query in enumerate(order // CLASSES):
            cx, cy, w, h = prediction.boxes[image, query].tolist()
            x0, y0, x1, y1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            expected = [x0 * width, y0 * height, x1 * width, y1 * height]
            assert detections.boxes[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
            mask = torch.from_numpy(decode_plainly(prediction.vectors[image, query].numpy())[1])
            pasted = paste_masks(mask[None], detections.boxes[row][None], (height, width))[0].numpy()
            assert detections.masks[row]["size"] == [height, width]
            assert np.array_equal(coco_mask.decode(detections.masks[row]), pasted)


def test_a_query_with_several_classes_has_its_mask_decoded_once():
    class Counting(DCTCodec):
        decoded = 0

        def decode_masks(self, vectors):
            Counting.decoded += len(vectors)
            return super().decode_masks(vectors)

    prediction = random_prediction(queries=3, batch=1)
    detections = postprocess(prediction, SIZES[:1], Counting(MASK_SIZE, VECTOR_DIM), class_names=NAMES)[0]
    assert len(detections.scores) == 3 * CLASSES  # fewer pairs than top_k: all of them
    assert Counting.decoded == 3
    for query in range(3):
        rows = (detections.queries == query).nonzero().flatten().tolist()
        rles = [detections.masks[row] for row in rows]
        assert all(rle == rles[0] for rle in rles)
        assert len({id(rle) for rle in rles}) == len(rles)


def test_a_prefix_of_vectors_decodes_as_in_a_codec_of_its_length():
    prediction, options = random_prediction(), {"class_names": NAMES, "rescore": "sharpness"}
    found = postprocess(prediction, SIZES, DCTCodec(MASK_SIZE, VECTOR_DIM), vector_dim=7, **options)
    shorter = prediction._replace(vectors=prediction.vectors[..., :7])
    for ours, theirs in zip(found, postprocess(shorter, SIZES, DCTCodec(MASK_SIZE, 7), **options), strict=True):
        assert (ours.masks, ours.labels.tolist()) == (theirs.masks, theirs.labels.tolist())
        torch.testing.assert_close(ours.scores, theirs.scores)


def test_a_full_mask_is_certain_and_an_empty_one_is_not():
    decoded = torch.stack([torch.full((4, 4), level) for level in (1.0, 0.75, 0.0)])
    assert sharpness(decoded, decoded > 0.5).tolist() == [1, 0.75, 0]


def test_decoding_in_chunks_changes_nothing_and_bounds_what_is_decoded_at_once(monkeypatch):
    class Watched(DCTCodec):
        largest = 0

        def decode_masks(self, vectors):
            Watched.largest = max(Watched.largest, len(vectors))
            return super().decode_masks(vectors)

    prediction, codec = random_prediction(), Watched(MASK_SIZE, VECTOR_DIM)
    whole = postprocess(prediction, SIZES, codec, class_names=NAMES)
    monkeypatch.setattr(module, "PIXELS_PER_CHUNK", 5 * MASK_SIZE**2 + 1)
    Watched.largest = 0
    chunked = postprocess(prediction, SIZES, codec, class_names=NAMES)
    assert Watched.largest == 5
    assert [detections.masks for detections in chunked] == [detections.masks for detections in whole]


def test_a_plain_detector_has_no_masks():
    prediction = random_prediction()._replace(vectors=None)
    detections = postprocess(prediction, SIZES, None, top_k=5, class_names=NAMES)[1]
    assert detections.masks is None
    assert detections.boxes.shape == (5, 4)


def test_an_empty_batch_gives_no_detections():
    prediction = LayerPrediction(*(tensor[:0] for tensor in random_prediction()[:3]))
    assert postprocess(prediction, [], DCTCodec(MASK_SIZE, VECTOR_DIM), class_names=NAMES) == []


def test_boxes_outside_the_image_are_kept_unclipped_with_empty_masks():
    prediction = random_prediction(queries=1, batch=1)
    outside = xyxy_to_cxcywh(torch.tensor([[[1.2, 0.1, 1.5, 0.4]]]))
    detections = postprocess(
        prediction._replace(boxes=outside), [(10, 20)], DCTCodec(MASK_SIZE, VECTOR_DIM), class_names=NAMES
    )[0]
    assert detections.boxes[0].tolist() == pytest.approx([24, 1, 30, 4], abs=1e-4)
    assert coco_mask.area(detections.masks[0]) == 0


def test_half_precision_is_raised_before_it_is_scored_and_decoded():
    half = LayerPrediction(*(tensor.bfloat16() for tensor in random_prediction()[:3]))
    raised = LayerPrediction(*(tensor.float() for tensor in half[:3]))
    codec = DCTCodec(MASK_SIZE, VECTOR_DIM)
    first, second = (postprocess(each, SIZES, codec, class_names=NAMES)[0] for each in (half, raised))
    assert first.scores.dtype == first.boxes.dtype == torch.float32
    assert torch.equal(first.boxes, second.boxes)
    assert first.masks == second.masks


def test_what_does_not_fit_together_is_named():
    prediction, codec = random_prediction(), DCTCodec(MASK_SIZE, VECTOR_DIM)
    with pytest.raises(ValueError, match="1 original sizes for predictions of 2 images"):
        postprocess(prediction, SIZES[:1], codec, class_names=NAMES)
    with pytest.raises(ValueError, match="3 class names for 4 class channels"):
        postprocess(prediction, SIZES, codec, class_names=NAMES[:3])
    with pytest.raises(ValueError, match="vectors of length 20, the codec has 21; use the codec the model was trained"):
        postprocess(prediction, SIZES, DCTCodec(MASK_SIZE, 21), class_names=NAMES)
    prediction.logits[1, 3] = float("nan")
    with pytest.raises(ValueError, match="image 1 of the batch: scores or boxes are not finite"):
        postprocess(prediction, SIZES, codec, class_names=NAMES)
