"""What Hu et al., Sparse Model Inversion, ICML 2024, measured: the figures that a page puts beside its own."""

from __future__ import annotations

# Table 1: resolution, model -> iterations/s, GFLOP
TABLE1 = {(32, "ResNet-18"): (77.91, 0.11), (224, "ResNet-18"): (10.21, 5.47), (224, "DeiT-B/16"): (1.79, 6475.63)}
# Table 2: what is inverted -> classification loss before and after
TABLE2 = {"background": (10.78, 10.69), "foreground": (10.78, 0.12)}
# Table 3, DeiT-B: source of the calibration -> iterations/s, GFLOP, MB, W8/A8, W4/A8
TABLE3 = {
    "the model in floating point": (None, None, None, 81.85, 81.85),
    "Gaussian noise": (None, None, None, 14.72, 11.09),
    "PSAQ-ViT, dense": (0.46, 6475.63, 9327.12, 78.93, 76.73),
    "dense inversion": (1.19, 6475.63, 4096.96, 78.58, 75.99),
    "sparse inversion": (4.51, 1578.97, 1516.64, 79.63, 77.51),
}
# Table 4, DeiT-B on CIFAR-10, which has ten classes as well: images -> accuracy of the student
TABLE4 = {"teacher": 95.36, "dense inversion": 90.02, "sparse inversion": 95.10}
# Table 5: inversion -> samples and rounds to the accuracy of 90.02 %
TABLE5 = {"dense": (14_080, 110), "sparse": (5_540, 43)}
# Tables 6 and 7: (iteration of 4000, share that stops), ... -> accuracy of a DeiT-T that learns CIFAR-10
TABLE7 = {
    ((100, 0.77),): 88.82,
    ((200, 0.77),): 89.02,
    ((400, 0.77),): 89.13,
    ((50, 0.4), (150, 0.6)): 89.26,
    ((100, 0.4), (200, 0.6)): 89.38,
    ((250, 0.4), (300, 0.6)): 90.02,
    ((30, 0.3), (70, 0.3), (150, 0.3), (200, 0.3)): 89.90,
    ((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3)): 90.08,
    ((200, 0.3), (250, 0.3), (350, 0.3), (450, 0.3)): 90.14,
}
ITERATIONS = 4000  # of all inversions of the paper
# Table 8: batch -> times that sparse is faster than dense
TABLE8 = {"DeiT-B": {32: 3.21, 64: 3.52, 128: 3.79}, "DeiT-T": {32: 1.75, 64: 2.39, 128: 2.57, 256: 2.60}}
