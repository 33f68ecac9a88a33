"""The Fréchet distance between two normal distributions and the moments it needs, in float64."""

import torch


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [F] and unbiased covariance [F, F], both float64, of features [N, F].

    ValueError if N < 2 or a feature is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features [N, F] with N at least 2, not {list(features.shape)}")
    features = features.double()
    if not features.isfinite().all():
        raise ValueError("features must be finite; some are NaN or infinite")
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(
    mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor
) -> float:
    """Squared Fréchet (2-Wasserstein) distance between N(mean1, cov1) and N(mean2, cov2).

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)

    Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions". With
    C = L L^T the last trace is the sum of the singular values of L1^T L2: no square root of a product is
    taken, so singular covariances lose no digits. Means [F], covariances [F, F] (symmetric, positive
    semi-definite). Never negative; a distribution and itself are at most F * 2^-52 * tr(C) apart.
    ValueError for other shapes or values that are not finite.
    """
    mean1, cov1, mean2, cov2 = (
        torch.as_tensor(value, device="cpu").double() for value in (mean1, cov1, mean2, cov2)
    )
    size = len(mean1) if mean1.ndim == 1 else -1
    if mean2.shape != (size,) or cov1.shape != (size, size) or cov2.shape != (size, size):
        shapes = ", ".join(str(list(value.shape)) for value in (mean1, cov1, mean2, cov2))
        raise ValueError(f"means must be [F] and covariances [F, F] of one F, not {shapes}")
    if not all(value.isfinite().all() for value in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite; some values are NaN or infinite")
    cross = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _factor(cov: torch.Tensor) -> torch.Tensor:
    """L [F, F] with L L^T = cov; eigenvalues that rounding made negative count as zero."""
    eigenvalues, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return vectors * eigenvalues.clamp(min=0).sqrt()
