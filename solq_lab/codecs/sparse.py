"""Few atoms of a learnt dictionary. Paper: section 3.2, eq. 3; table 3a, row "Sparse Coding".

Shape letters beside the usual ones: N*N mask pixels, D atoms.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from solq_lab.codecs.base import CodecFit, FittedCodec, product_dtype

STEPS_PER_CHECK = 10  # of the solver, between two tests for convergence
MAX_STEPS = 5000
MASKS_PER_UPDATE = 256


class SparseCodingCodec(FittedCodec):
    """Lasso coefficients of a mask on D unit atoms: v minimises 1/2 ||m - v A||^2 + beta ||v||_1 for the dictionary A.

    Encoding is neither linear nor differentiable; decoding, v A, is both.

    Args:
        mask_size: side N of the masks, mask pixels.
        vector_dim: number D of atoms.
        beta: weight of the L1 norm; the larger, the fewer coefficients. The paper does not give its value.
        tolerance: coefficients are final when their duality gap is below this share of 1/2 ||m||^2.

    Raises:
        ValueError: sizes that do not fit, beta or tolerance not positive.
    """

    method = "sparse"
    atoms: Tensor

    def __init__(self, mask_size: int, vector_dim: int, *, beta: float = 1.0, tolerance: float = 1e-4) -> None:
        super().__init__(mask_size, vector_dim)
        if not (beta > 0 and tolerance > 0):
            raise ValueError(f"beta {beta} and tolerance {tolerance}: allowed are positive numbers")
        self.beta, self.tolerance = beta, tolerance
        self.register_buffer("atoms", torch.zeros(vector_dim, mask_size**2))  # unit rows

    @property
    def settings(self) -> dict[str, bool | float]:
        return {"beta": self.beta}

    def start_fit(self, seed: int = 0) -> DictionaryFit:
        """A new fit by scikit-learn.

        Raises:
            ValueError: scikit-learn is not installed.
        """
        return DictionaryFit(self, seed)

    @torch.no_grad()
    def encode(self, masks: Tensor) -> Tensor:
        self._check_fitted()
        self.check_masks(masks)
        dtype = torch.promote_types(masks.dtype, torch.float32)
        exact = product_dtype(dtype, masks.device)
        pixels, atoms = masks.flatten(1).to(exact), self.atoms.to(exact)  # (K, N, N) -> (K, N*N)
        with torch.autocast(masks.device.type, enabled=False):
            energy = pixels.square().sum(dim=1)
            vectors = solve_lasso(pixels @ atoms.T, atoms @ atoms.T, energy, beta=self.beta, tolerance=self.tolerance)
        return vectors.to(dtype)

    def decode(self, vectors: Tensor) -> Tensor:
        self._check_fitted()
        self.check_vectors(vectors)
        exact = product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            pixels = vectors.to(exact) @ self.atoms.to(exact)
        return pixels.to(vectors.dtype).unflatten(1, (self.mask_size, self.mask_size))  # (K, N*N) -> (K, N, N)


class DictionaryFit(CodecFit):
    """scikit-learn's mini-batch dictionary learning (Mairal et al., JMLR 2010), started from training masks.

    Every step has its own generator, seeded by the seed and the step's number, so that a restored fit takes the same
    steps as one that never stopped.
    """

    def __init__(self, codec: SparseCodingCodec, seed: int) -> None:
        try:
            from sklearn.decomposition import MiniBatchDictionaryLearning
        except ImportError:
            raise ValueError(
                "fitting a sparse-coding dictionary needs scikit-learn: pip install 'solq-lab[sparse]'"
            ) from None
        self._codec, self._seed = codec, seed
        self._pixels = codec.mask_size**2
        self._learner = MiniBatchDictionaryLearning(codec.vector_dim, alpha=codec.beta, fit_algorithm="cd")
        self.batch_size = max(MASKS_PER_UPDATE, codec.vector_dim)  # the first batch initialises the atoms

    def update(self, masks: Tensor) -> None:
        """Learn from masks (K, N, N) bool, K at least 1."""
        pixels = masks.flatten(1).to("cpu", torch.float64).numpy()  # (K, N, N) -> (K, N*N)
        step = getattr(self._learner, "n_steps_", 0)
        random = np.random.RandomState(np.random.SeedSequence((self._seed, step)).generate_state(4))
        if step == 0:
            self._learner.set_params(dict_init=self._first_atoms(pixels, random), random_state=random)
        else:
            self._learner._random_state = random
        self._step(pixels)

    def state(self) -> dict[str, Tensor]:
        learner = self._learner
        return {
            "atoms": torch.from_numpy(learner.components_.copy()),
            "code_products": torch.from_numpy(learner._A.copy()),
            "mask_products": torch.from_numpy(learner._B.copy()),
            "steps": torch.tensor(learner.n_steps_),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        # A first step on one empty mask makes scikit-learn create the attributes of its later steps.
        self._learner.set_params(dict_init=state["atoms"].numpy().copy())
        self._step(np.zeros((1, self._pixels)))
        self._learner.components_ = np.asfortranarray(state["atoms"].numpy())
        self._learner._A = state["code_products"].numpy().copy()
        self._learner._B = state["mask_products"].numpy().copy()
        self._learner.n_steps_ = int(state["steps"])

    def tables(self) -> dict[str, Tensor]:
        atoms = torch.from_numpy(self._learner.components_.copy())
        lengths = atoms.norm(dim=1, keepdim=True)  # at most one: scikit-learn only bounds them
        return {"atoms": (atoms / lengths.clamp(min=1e-12)).float()}

    def _first_atoms(self, pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """(D, N*N) atoms of length one: masks of the first batch, each once, and noise where there are too few."""
        atoms = random.standard_normal((self._codec.vector_dim, self._pixels))
        chosen = random.permutation(np.flatnonzero(pixels.any(axis=1)))[: len(atoms)]
        atoms[: len(chosen)] = pixels[chosen] + 0.01 * atoms[: len(chosen)]  # noise separates equal masks
        return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)

    def _step(self, pixels: np.ndarray) -> None:
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a step of the atoms needs no exact coefficients
            self._learner.partial_fit(pixels)


def solve_lasso(correlation: Tensor, gram: Tensor, energy: Tensor, *, beta: float, tolerance: float) -> Tensor:
    """Minimisers v of 1/2 ||m - v A||^2 + beta ||v||_1, by accelerated proximal gradient steps (FISTA) on all at once.

    Momentum is reset where it points uphill (O'Donoghue and Candes, 2015). Every few steps the duality gap of each
    minimiser is measured; those below the tolerance are final and leave the batch, so none depends on its neighbours.

    Args:
        correlation: m A^T, (K, D).
        gram: A A^T, (D, D).
        energy: ||m||^2, (K,).
        beta: weight of the L1 norm, positive.
        tolerance: largest duality gap, as a share of 1/2 ||m||^2.

    Returns:
        (K, D) vectors.
    """
    result = torch.zeros_like(correlation)
    if len(correlation) == 0:
        return result
    step = 1 / torch.linalg.eigvalsh(gram)[-1].clamp(min=1e-12)
    open_rows = torch.arange(len(correlation), device=correlation.device)
    vectors = extrapolated = result.clone()
    momentum = correlation.new_ones(len(correlation), 1)
    for number in range(MAX_STEPS):
        # Take finished minimisers out of the batch.
        if number % STEPS_PER_CHECK == 0:
            gap = duality_gap(vectors, correlation, gram, energy, beta=beta)
            unfinished = gap > tolerance * energy / 2
            result[open_rows] = vectors
            if not unfinished.any():
                break
            rows = unfinished.nonzero().squeeze(1)  # once: on a GPU each boolean index makes the host wait
            open_rows, correlation, energy = open_rows[rows], correlation[rows], energy[rows]
            vectors, extrapolated, momentum = vectors[rows], extrapolated[rows], momentum[rows]

        # A gradient step, soft thresholding, and extrapolation.
        moved = extrapolated + step * (correlation - extrapolated @ gram)
        next_vectors = moved.sign() * (moved.abs() - step * beta).clamp(min=0)
        uphill = ((extrapolated - next_vectors) * (next_vectors - vectors)).sum(dim=1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        next_momentum = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        extrapolated = next_vectors + (momentum - 1) / next_momentum * (next_vectors - vectors)
        vectors, momentum = next_vectors, next_momentum
    result[open_rows] = vectors
    return result


def duality_gap(vectors: Tensor, correlation: Tensor, gram: Tensor, energy: Tensor, *, beta: float) -> Tensor:
    """Upper bound (K,) of the distance of the Lasso objective of vectors (K, D) from its minimum.

    The dual point is the residual r = m - v A, shrunk until no atom correlates with it by more than beta. All is
    computed from products with the atoms, never from N*N pixels.
    """
    projected = vectors @ gram
    fit = (vectors * correlation).sum(dim=1)
    residual = (energy - 2 * fit + (vectors * projected).sum(dim=1)).clamp(min=0)  # ||r||^2
    steepest = (correlation - projected).abs().amax(dim=1)
    shrink = (beta / steepest.clamp(min=beta)).clamp(max=1)
    primal = residual / 2 + beta * vectors.abs().sum(dim=1)
    dual = shrink * (energy - fit) - shrink.square() * residual / 2  # m.s - ||s||^2 / 2 of the dual point s
    return primal - dual
