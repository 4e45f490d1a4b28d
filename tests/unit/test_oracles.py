import numpy as np
import torch

from metasepia.synthetic.oracles import bayes_optimal, expected_accuracy, logistic_regression
from metasepia.synthetic.tasks import ProbabilisticLogisticRegression, Seeds


def test_the_bayes_optimal_predictor_agrees_with_quadrature_over_one_weight_and_two_alphas():
    family = ProbabilisticLogisticRegression(dims=1, alphas=(2.0, 10.0))
    batch = family.batch(Seeds(), 0, num_sequences=12, num_pairs=10)
    x, y, queries = batch.x[:, :6], batch.y[:, :6], batch.x[:, 6:]
    w = torch.linspace(-60, 60, 12_001, dtype=torch.float64)
    joint, evidence = torch.zeros(12, 4, dtype=torch.float64), torch.zeros(12, 1, dtype=torch.float64)
    likelihood = torch.sigmoid((2 * y - 1)[:, :, None] * x * w).prod(1)  # [problems, grid]
    for alpha in family.alphas:
        density = likelihood * torch.exp(-0.5 * (w / alpha) ** 2) / alpha
        joint += torch.einsum("pg,pqg->pq", density, torch.sigmoid(queries * w).double())
        evidence += density.sum(1, keepdim=True)
    ours = bayes_optimal(x, y, queries, alphas=family.alphas, chains=32, samples=200)
    torch.testing.assert_close(ours.probabilities.double(), joint / evidence, atol=0.015, rtol=0)
    assert ours.standard_error < 0.005


def test_no_predictor_beats_the_one_that_knows_w_nor_on_average_the_bayes_optimal_one():
    batch = ProbabilisticLogisticRegression(dims=4).batch(Seeds(), 1, num_sequences=60, num_pairs=48)
    x, y, queries, true = batch.x[:, :16], batch.y[:, :16], batch.x[:, 16:], batch.probabilities[:, 16:]
    bayes = bayes_optimal(x, y, queries, chains=8, samples=100).probabilities
    fitted = np.stack(
        [logistic_regression(x[i].numpy(), y[i].numpy(), queries[i].numpy()) for i in range(60)], dtype=np.float32
    )
    scores = [float(expected_accuracy(p, true).mean()) for p in (true, bayes, torch.from_numpy(fitted))]
    assert scores[0] > scores[1] > scores[2] > 0.6


def test_logistic_regression_on_one_class_predicts_that_class():
    x = np.eye(3)
    assert logistic_regression(x, np.ones(3), x).tolist() == [1.0, 1.0, 1.0]
