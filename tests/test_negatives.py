from itertools import product

import pytest
import torch

from ffkernels import negatives


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8])
def test_overlay_is_one_hot_times_value_and_leaves_the_rest(dtype, label_dtype):
    x = torch.rand(6, 9, generator=seeded(0)).to(dtype)
    kept = x.clone()
    labels = torch.tensor([2, 0, 3, 1, 1, 2], dtype=label_dtype)
    got = negatives.overlay_label(x, labels, 4, value=0.7)
    want = x.clone()
    for row, column in product(range(6), range(4)):
        want[row, column] = 0.7 if column == int(labels[row]) else 0.0
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(x, kept), "the input was written to"


def test_overlay_of_inputs_without_plain_layout():
    base = torch.rand(8, 6, generator=seeded(1))
    labels = torch.arange(6) % 3
    for x in (base.T, base.T[:, ::2], base[:1].expand(6, 6), torch.rand(6, 20)[:, 5:]):
        got = negatives.overlay_label(x, labels, 3)
        assert got.is_contiguous()
        assert torch.equal(got[:, :3], torch.eye(3)[labels])
        assert torch.equal(got[:, 3:], x[:, 3:])
    assert torch.equal(negatives.overlay_label(base[:0], labels[:0], 3), base[:0])
    as_wide = negatives.overlay_label(torch.rand(2, 3), torch.tensor([2, 1]), 3, value=2)
    assert torch.equal(as_wide, torch.tensor([[0.0, 0, 2], [0, 2, 0]]))


def test_gradient_reaches_only_the_columns_that_are_kept():
    x = torch.rand(2, 5, requires_grad=True)
    negatives.overlay_label(x, torch.tensor([0, 1]), 2).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 0, 1, 1, 1]] * 2))


def test_neutral_label_is_one_over_classes_or_the_given_value():
    x = torch.rand(3, 12, generator=seeded(2), dtype=torch.float64)
    for value, want in ((None, 0.1), (0.25, 0.25)):
        got = negatives.neutral_label(x, value=value)
        assert torch.equal(got[:, :10], torch.full((3, 10), want, dtype=torch.float64))
        assert torch.equal(got[:, 10:], x[:, 10:])
        assert not torch.equal(x[:, :10], got[:, :10])


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_wrong_label_is_uniform_over_the_wrong_ones(classes):
    draws = 9000
    labels = torch.arange(classes).repeat_interleave(draws)
    got = negatives.wrong_label(labels, classes, seeded(3))
    assert got.dtype == torch.int64
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts.index_put_((labels, got), torch.ones_like(got), accumulate=True)
    assert torch.equal(counts.diagonal(), torch.zeros(classes, dtype=torch.int64))
    expected = draws / (classes - 1)
    wrong = counts[~torch.eye(classes, dtype=torch.bool)].view(classes, classes - 1)
    # K-2 degrees of freedom; 8 of them pass 33 once in 16 000 times
    chi_square = ((wrong - expected) ** 2 / expected).sum(1)
    assert chi_square.max() < 33, chi_square


def test_wrong_label_keeps_shape_follows_the_seed_and_takes_any_integer_dtype():
    labels = torch.randint(0, 10, (40, 5), generator=seeded(4))
    got = negatives.wrong_label(labels, generator=seeded(5))
    assert got.shape == labels.shape
    assert (got != labels).all()
    assert torch.equal(got, negatives.wrong_label(labels.to(torch.uint8), generator=seeded(5)))
    assert not torch.equal(got, negatives.wrong_label(labels, generator=seeded(6)))
    assert negatives.wrong_label(labels[:0]).shape == (0, 5)


def test_labels_that_a_device_cannot_check_come_out_marked(monkeypatch):
    monkeypatch.setattr(negatives, "_check_labels", lambda labels, num_classes: None)
    labels = torch.tensor([1, 7, -1])
    got = negatives.overlay_label(torch.ones(3, 8), labels, 3)
    assert torch.equal(got[0], torch.tensor([0.0, 1, 0, 1, 1, 1, 1, 1]))
    assert got[1:, :3].isnan().all()
    assert torch.equal(got[1:, 3:], torch.ones(2, 5))
    assert negatives.wrong_label(labels, 3)[1:].tolist() == [-1, -1]


def naive_masks(bits: torch.Tensor, blurs: int) -> torch.Tensor:
    """Pixel by pixel, pass by pass, the edge repeated outside the image."""
    count, height, width = bits.shape
    image = bits.double().tolist()
    for _, down in product(range(blurs), (True, False)):
        for n in range(count):
            old = [row[:] for row in image[n]]
            for i, j in product(range(height), range(width)):
                if down:
                    before, after = old[max(i - 1, 0)][j], old[min(i + 1, height - 1)][j]
                else:
                    before, after = old[i][max(j - 1, 0)], old[i][min(j + 1, width - 1)]
                image[n][i][j] = 0.25 * before + 0.5 * old[i][j] + 0.25 * after
    return torch.tensor(image) > 0.5


# up to two passes every value is a multiple of 1/256, so ties with 0.5 fall the same way in any precision
@pytest.mark.parametrize("blurs", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(4, 5), (1, 6), (3, 1)])
def test_masks_and_hybrids_equal_the_loop_over_pixels(height, width, blurs):
    rows = 5
    x = torch.rand(rows, height * width, generator=seeded(7))
    got = negatives.hybrid_images(x, seeded(8), height=height, width=width, blurs=blurs)

    drawn = seeded(8)
    bits = torch.randint(0, 2, (rows, height, width), generator=drawn, dtype=torch.float32)
    order = torch.randperm(rows, generator=drawn).tolist()
    partner = {one: order[(at + 1) % rows] for at, one in enumerate(order)}
    masks = naive_masks(bits, blurs)
    want = torch.empty_like(x)
    for row, i, j in product(range(rows), range(height), range(width)):
        source = row if masks[row, i, j] else partner[row]
        want[row, i * width + j] = x[source, i * width + j]

    assert torch.equal(negatives.random_masks(rows, height, width, blurs=blurs, generator=seeded(8)), masks)
    assert torch.equal(got, want)
    as_images = x.view(rows, height, width)
    assert torch.equal(negatives.hybrid_images(as_images, seeded(8), blurs=blurs), want.view(as_images.shape))


def test_blur_of_many_passes_is_the_filter_applied_so_often():
    once = negatives._blur_matrix(7, 1, torch.device("cpu")).double()
    assert torch.equal(once.sum(1), torch.ones(7, dtype=torch.float64))
    assert once[0].tolist() == [0.75, 0.25, 0, 0, 0, 0, 0]
    assert once[3].tolist() == [0, 0, 0.25, 0.5, 0.25, 0, 0]
    want = torch.eye(7, dtype=torch.float64)
    for _ in range(10):
        want = once @ want
    got = negatives._blur_matrix(7, 10, torch.device("cpu")).double()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_masks_are_blobs_on_half_of_the_area_at_the_edge_as_in_the_middle():
    masks = negatives.random_masks(2000, 28, 28, generator=seeded(9))
    assert masks.dtype == torch.bool
    share = masks.float().mean(0)
    assert abs(share.mean() - 0.5) < 0.01
    assert abs(share[0].mean() - 0.5) < 0.02
    assert abs(share[:, -1].mean() - 0.5) < 0.02
    assert (share - 0.5).abs().max() < 0.06
    # random bits change at every second pixel; blobs of a few pixels at about every tenth
    changes = (masks[:, :, 1:] != masks[:, :, :-1]).float().mean()
    assert 0.05 < changes < 0.15


@pytest.mark.parametrize("rows", [2, 3, 5, 64])
def test_an_image_is_never_mixed_with_itself(rows):
    x = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 400)
    for seed in range(20):
        got = negatives.hybrid_images(x, seeded(seed), blurs=0)
        own = got == x
        assert ((own.float().mean(1) - 0.5).abs() < 0.15).all()
        others = [set(row[~same].tolist()) for row, same in zip(got, own, strict=True)]
        assert all(len(values) == 1 for values in others), "a third image in the mix"
        assert set().union(*others) == set(range(rows)), "an image used more than once as the second"


def test_every_other_image_can_be_the_partner():
    x = torch.arange(4, dtype=torch.float64)[:, None].expand(4, 100)
    generator = seeded(10)
    counts = torch.zeros(4, 4)
    for _ in range(900):
        got = negatives.hybrid_images(x, generator, blurs=0)
        partners = torch.stack([row[row != n][0] for n, row in enumerate(got)]).long()
        counts[torch.arange(4), partners] += 1
    wrong = counts[~torch.eye(4, dtype=torch.bool)]
    assert ((wrong - 300).abs() < 75).all(), counts


def test_hybrids_keep_dtype_and_a_seed_names_one_result():
    x = torch.rand(3, 49, generator=seeded(11))
    got = negatives.hybrid_images(x, seeded(12))
    assert torch.equal(got, negatives.hybrid_images(x, seeded(12)))
    assert not torch.equal(got, negatives.hybrid_images(x, seeded(13)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, negatives.hybrid_images(x, seeded(12)))
    low = negatives.hybrid_images(x.bfloat16(), seeded(12))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, got.bfloat16())
    assert torch.equal(got, negatives.hybrid_images(x.T.contiguous().T, seeded(12), height=7))


def test_a_bad_pixel_of_the_other_image_stays_there():
    x = torch.tensor([[float("nan")] * 64, [1.0] * 64])
    got = negatives.hybrid_images(x, seeded(14), blurs=0)
    mask = negatives.random_masks(2, 8, 8, blurs=0, generator=seeded(14)).view(2, 64)
    assert torch.equal(got[1].isnan(), ~mask[1])


X = torch.rand(4, 16)
LABELS = torch.tensor([0, 1, 2, 3])
OTHER = torch.Generator()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: negatives.overlay_label([[1.0]], LABELS), TypeError, "x must be a tensor"),
        (lambda: negatives.overlay_label(X.int(), LABELS), TypeError, "x must be of a floating-point dtype"),
        (lambda: negatives.overlay_label(X[0], LABELS), ValueError, r"x must be \[rows, width\]"),
        (
            lambda: negatives.overlay_label(X, LABELS, 17),
            ValueError,
            "num_classes must be at most .* 16; got 17",
        ),
        (lambda: negatives.overlay_label(X, LABELS, 1), ValueError, "num_classes must be at least 2; got 1"),
        (lambda: negatives.overlay_label(X, LABELS, 4.0), TypeError, "num_classes must be an int"),
        (lambda: negatives.overlay_label(X, [0, 1, 2, 3]), TypeError, "labels must be a tensor"),
        (
            lambda: negatives.overlay_label(X, LABELS.float()),
            TypeError,
            "labels .* integer dtype, as labels.long.. is; got torch.float32",
        ),
        (
            lambda: negatives.overlay_label(X, LABELS.bool()),
            TypeError,
            "labels .* integer dtype, as labels.long.. is; got torch.bool",
        ),
        (lambda: negatives.overlay_label(X, LABELS, 3), ValueError, r"labels must lie in 0\.\.2; got 0\.\.3"),
        (
            lambda: negatives.overlay_label(X, LABELS - 1),
            ValueError,
            r"labels must lie in 0\.\.9; got -1\.\.2",
        ),
        (lambda: negatives.overlay_label(X, LABELS[:3]), ValueError, r"labels must be \[4\], .*; got \[3\]"),
        (
            lambda: negatives.overlay_label(X, LABELS[:, None]),
            ValueError,
            r"labels must be \[4\], .*; got \[4, 1\]",
        ),
        (
            lambda: negatives.overlay_label(X, LABELS.to("meta")),
            ValueError,
            "labels .* device of x, cpu; got meta",
        ),
        (lambda: negatives.overlay_label(X, LABELS, value=float("nan")), ValueError, "value must be finite"),
        (lambda: negatives.overlay_label(X, LABELS, value="1"), TypeError, "value must be a number"),
        (lambda: negatives.neutral_label(X.long()), TypeError, "x must be of a floating-point dtype"),
        (lambda: negatives.neutral_label(X, 20), ValueError, "num_classes must be at most"),
        (lambda: negatives.neutral_label(X, 0), ValueError, "num_classes must be at least 2"),
        (lambda: negatives.neutral_label(X, value=float("inf")), ValueError, "value must be finite"),
        (lambda: negatives.wrong_label(LABELS, 1), ValueError, "num_classes must be at least 2"),
        (lambda: negatives.wrong_label(LABELS, 3), ValueError, r"labels must lie in 0\.\.2"),
        (lambda: negatives.wrong_label(LABELS.double()), TypeError, "labels must be of an integer dtype"),
        (
            lambda: negatives.wrong_label(LABELS, generator=3),
            TypeError,
            "generator must be a torch.Generator",
        ),
        (
            lambda: negatives.wrong_label(LABELS.to("meta"), generator=OTHER),
            ValueError,
            "generator .* meta; got",
        ),
        (lambda: negatives.hybrid_images(X[:1]), ValueError, "x must hold at least 2 rows.* got 1"),
        (lambda: negatives.hybrid_images(X[:0]), ValueError, "x must hold at least 2 rows.* got 0"),
        (lambda: negatives.hybrid_images(X.int()), TypeError, "x must be of a floating-point dtype"),
        (lambda: negatives.hybrid_images(X[0]), ValueError, "x must be .*rows, height, width"),
        (lambda: negatives.hybrid_images(X[:, :15]), ValueError, "height . width must be the 15 columns"),
        (lambda: negatives.hybrid_images(X, height=3), ValueError, r"16 columns of x; got 3 \* 5"),
        (lambda: negatives.hybrid_images(X, width=17), ValueError, "16 columns"),
        (lambda: negatives.hybrid_images(X, height=0), ValueError, "height must be at least 1"),
        (lambda: negatives.hybrid_images(X[:, :0]), ValueError, "0 columns"),
        (lambda: negatives.hybrid_images(X.view(4, 4, 4), height=2), ValueError, r"those of x, \(4, 4\)"),
        (lambda: negatives.hybrid_images(X, blurs=-1), ValueError, "blurs must be at least 0"),
        (
            lambda: negatives.hybrid_images(X.to("meta"), OTHER),
            ValueError,
            "generator must be of the data's device",
        ),
        (lambda: negatives.random_masks(2, 3, 0), ValueError, "width must be at least 1"),
        (lambda: negatives.random_masks(2.0, 3, 3), TypeError, "count must be an int"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_nothing_waits_for_the_host():
    device = torch.device("cuda")
    x, labels = torch.rand(64, 784, device=device), torch.randint(0, 10, (64,), device=device)
    generator = torch.Generator(device).manual_seed(0)

    def draw():
        return negatives.overlay_label(x, negatives.wrong_label(labels, generator=generator)), (
            negatives.hybrid_images(negatives.neutral_label(x), generator)
        )

    draw()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrong, hybrid = draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wrong.device == hybrid.device == x.device
    assert (wrong[:, :10].argmax(1) != labels).all()
    assert torch.equal(wrong[:, 10:], x[:, 10:])
