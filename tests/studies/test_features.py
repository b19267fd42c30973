"""The features of Fig. 9 are what timm's head is given, of whole images and of kept patches."""

import torch

from smi_fast.distillation import Reader
from smi_fast.studies.features import inverted_features, nearest, of_classes, real_features


def test_features_are_what_the_head_takes(run, models, data):
    reader = Reader(run.model, run.fast.image_size)
    found, labels = real_features(run, reader)
    images = torch.cat([images for images, _ in run.test(run.settings.feature_images)])
    head = models[0].forward_head(models[0].forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, head, atol=1e-5, rtol=1e-4)
    assert len(labels) == 9


def test_features_of_inverted_images_see_the_kept_patches_only(run):
    reader = Reader(run.model, run.fast.image_size)
    dataset = run.inverted(run.sparse, 0, 4)
    images = (dataset.images() - run.mean) / run.std
    keep = dataset.positions.view(4, -1).long()
    logits = run.fast(images, keep=keep)
    torch.testing.assert_close(run.model.head(inverted_features(reader, dataset)), logits, atol=1e-5, rtol=1e-4)


def test_the_share_that_is_nearest_to_its_class():
    means, classes = torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([3, 7])
    features = torch.tensor([[0.1, 5], [0.9, 0], [0.2, 0], [0.8, 1]])
    assert nearest(features, torch.tensor([3, 7, 7, 3]), means, classes) == 50


def test_images_of_a_class_without_a_mean_are_left_out():
    features, labels = torch.arange(8.0).view(4, 2), torch.tensor([3, 5, 7, 8])
    kept, of = of_classes(features, labels, torch.tensor([3, 7]))
    assert (kept.tolist(), of.tolist()) == ([[0, 1], [4, 5]], [3, 7])
