"""SAC, DDPG and the methods on them, against their equations."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from agents import AGENTS
from agents.core.errors import UserError
from agents.core.saliency import frame_saliency, input_gradient, mask_channels, quantile_mask
from agents.off_policy import ddpg, sac, sgqn, svea
from agents.off_policy.actor_critic import td_target
from agents.off_policy.critic_methods import td_loss
from tests.agents.helpers import (
    ACTION,
    BOTH,
    PIXELS,
    STATE,
    observation,
    pixel_agents,
    small_agent,
    transitions,
)


def test_terminations_do_not_bootstrap_and_everything_else_does():
    reward, value = torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0])
    discount = torch.tensor([0.9, 0.0])
    assert td_target(reward, discount, value).tolist() == [10.0, 1.0]


def test_td_loss_is_the_sum_of_both_critics_mean_squared_errors():
    q1, q2, target = torch.randn(3, 6)
    expected = ((q1 - target) ** 2).sum() / 6 + ((q2 - target) ** 2).sum() / 6
    torch.testing.assert_close(td_loss((q1, q2), target), expected)


def test_sac_target_is_reward_plus_discounted_soft_value_of_the_target_critic():
    agent = small_agent("sac", STATE)
    batch = transitions(STATE)
    noise = torch.randn((8, 2), generator=torch.Generator().set_state(agent.generator.get_state()))
    target = agent.target_value(batch)
    mean, log_std = agent.actor(batch.next_observation["state"])
    policy = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()])
    action = torch.tanh(mean + log_std.exp() * noise)
    q = torch.minimum(*agent.target(batch.next_observation["state"], action))
    expected = batch.reward + 0.99 * (q - 0.1 * policy.log_prob(action).sum(-1))
    torch.testing.assert_close(target, expected, atol=1e-4, rtol=1e-4)


def test_sac_losses_equal_a_loop_over_samples():
    q1, q2, log_prob = torch.randn(3, 5)
    alpha = torch.tensor(0.3)
    expected = sum(0.3 * log_prob[i] - min(q1[i], q2[i]) for i in range(5)) / 5
    torch.testing.assert_close(sac.actor_loss((q1, q2), log_prob, alpha), expected)
    log_alpha = torch.tensor(-0.5, requires_grad=True)
    loss = sac.temperature_loss(log_alpha, log_prob, -2.0)
    (gradient,) = torch.autograd.grad(loss, log_alpha)
    # alpha falls while the policy's entropy is above its target
    expected = -(np.exp(-0.5) * (log_prob.numpy() - 2.0)).mean()
    np.testing.assert_allclose(gradient.item(), expected, rtol=1e-5)


def test_ddpg_target_uses_the_smaller_target_critic_at_a_clipped_noisy_action():
    agent = small_agent("ddpg", STATE)
    batch = transitions(STATE)
    noise = torch.randn((8, 2), generator=torch.Generator().set_state(agent.generator.get_state()))
    target = agent.target_value(batch)
    mean = agent.actor(batch.next_observation["state"])
    action = (mean + (1.0 * noise).clamp(-0.3, 0.3)).clamp(-1 + 1e-6, 1 - 1e-6)
    q = torch.minimum(*agent.target(batch.next_observation["state"], action))
    torch.testing.assert_close(target, batch.reward + 0.99 * q)


def test_ddpg_noise_follows_its_schedule():
    agent = small_agent("drqv2", noise_steps=100)
    seen = []
    for step in (0, 50, 100, 500):
        agent.set_progress(step)
        seen.append(agent.noise)
    np.testing.assert_allclose(seen, [1.0, 0.55, 0.1, 0.1])


def test_svea_loss_weighs_the_clean_and_the_augmented_view():
    clean, strong, target = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4)
    expected = (
        0.3 * ((clean - target) ** 2).mean(1).sum() + 0.7 * ((strong - target) ** 2).mean(1).sum()
    )
    loss = svea.svea_loss(tuple(clean), tuple(strong), target, 0.3, 0.7)
    torch.testing.assert_close(loss, expected)


def test_svea_regresses_both_views_on_one_target_and_returns_the_clean_features():
    agent = small_agent("svea")
    seen = observation()
    action, target = torch.zeros(8, 2), torch.ones(8)
    state = agent.generator.get_state()
    result = agent.method.critic_loss(agent.critic, seen, action, target, agent.generator)
    agent.generator.set_state(state)
    strong = agent.method.view(seen, agent.generator)
    critic = agent.critic
    clean_features = critic.encode(critic.normalize(seen))
    expected = 0.5 * td_loss(critic(clean_features, action), target) + 0.5 * td_loss(
        critic(critic.encode(critic.normalize(strong)), action), target
    )
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.features, clean_features)


def test_sgqn_critic_loss_equals_its_equation_computed_in_separate_passes():
    agent = small_agent("sgqn", quantile=0.9, consistency_weight=0.5)
    critic, seen, action, target = agent.critic, observation(), torch.zeros(8, 2), torch.ones(8)
    state = agent.generator.get_state()
    result = agent.method.critic_loss(critic, seen, action, target, agent.generator)
    fill = torch.rand((), generator=torch.Generator().set_state(state))

    pixels = critic.normalize(seen)["pixels"].requires_grad_()
    value = critic(critic.encode({"pixels": pixels}), action)[0]
    saliency = frame_saliency(input_gradient(value, pixels, "guided"))
    mask = quantile_mask(saliency, 0.9)
    low, high = pixels.min(), pixels.max()
    masked = torch.where(mask_channels(mask), pixels, low + (high - low) * fill).detach()
    full = critic(critic.encode({"pixels": pixels.detach()}), action)
    blanked = critic(critic.encode({"pixels": masked}), action)
    consistency = sum(((a - b) ** 2).mean() for a, b in zip(full, blanked, strict=True))
    torch.testing.assert_close(result.loss, td_loss(full, target) + 0.5 * consistency)
    assert torch.equal(result.kept.mask, mask)
    result.loss.backward(inputs=list(critic.parameters()))
    expected = torch.autograd.grad(
        td_loss(full, target) + 0.5 * consistency, list(critic.parameters())
    )
    for parameter, gradient in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_sgqn_masks_blank_everything_else_with_one_value():
    pixels, mask = torch.rand(2, 9, 6, 6), torch.rand(2, 3, 6, 6) > 0.5
    blanked = sgqn.blank_outside(pixels, mask, torch.tensor(0.25))
    wide = mask_channels(mask)
    assert torch.equal(blanked[wide], pixels[wide])
    assert blanked[~wide].unique().tolist() == [0.25]


def test_sgqn_auxiliary_step_trains_encoder_trunk_and_decoder_every_second_update():
    agent = small_agent("sgqn")
    agent.update(transitions())
    before = copy.deepcopy(agent.critic.state_dict())
    assert [agent.method.auxiliary_due(updates) for updates in (3, 4)] == [False, True]
    kept = sgqn.Attention(observation(), torch.rand(8, 3, 24, 24) > 0.5)
    metrics = agent.update_method(kept, torch.zeros(8, 2))
    assert set(metrics) == {"loss/attribution"}
    changed = {
        name.split(".")[0]
        for name, value in agent.critic.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"encoder", "trunk"}


def test_attribution_loss_is_binary_cross_entropy():
    logits, mask = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) > 0.5
    p = torch.sigmoid(logits)
    expected = -(torch.log(p[mask]).sum() + torch.log(1 - p[~mask]).sum()) / mask.numel()
    torch.testing.assert_close(sgqn.attribution_loss(logits, mask), expected)


@pytest.mark.parametrize("size", [24, 25, 84])
def test_attribution_decoder_predicts_at_the_pictures_size(size):
    decoder = sgqn.AttributionDecoder(10, 3, (size, size), (4, 4))
    assert decoder(torch.randn(2, 8), torch.randn(2, 2)).shape == (2, 3, size, size)


@pytest.mark.parametrize("name", pixel_agents())
def test_the_actors_loss_moves_neither_critic_nor_encoder(name):
    agent = small_agent(name)
    before = copy.deepcopy(agent.critic.state_dict())
    actor = copy.deepcopy(agent.actor.state_dict())
    agent.update_actor(torch.rand(8, agent.critic.pixel_features))
    for key, value in agent.critic.state_dict().items():
        assert torch.equal(value, before[key])
    assert any(not torch.equal(v, actor[k]) for k, v in agent.actor.state_dict().items())
    assert all(p.requires_grad for p in agent.critic.parameters())


@pytest.mark.parametrize("name", pixel_agents())
@pytest.mark.parametrize("space", [PIXELS, BOTH, STATE], ids=["pixels", "both", "state"])
def test_every_agent_learns_from_every_observation_it_takes(name, space):
    if space is STATE and any(method in name for method in ("svea", "sgqn")):
        with pytest.raises(UserError, match="augments pixels"):
            small_agent(name, space)
        return
    agent = small_agent(name, space)
    for seed in range(2):
        metrics = agent.update(transitions(space, seed=seed))
        assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
        assert all(torch.isfinite(v) for v in metrics.values())
    action, state, extras = agent.act(observation(space), explore=True)
    assert action.shape == (8, 2)
    assert action.dtype == np.float32
    assert np.abs(action).max() <= 1
    assert state is None
    assert extras == {}


@pytest.mark.parametrize("name", pixel_agents())
def test_a_restored_agent_goes_on_bit_for_bit(name):
    agent = small_agent(name, BOTH)
    for seed in range(3):
        agent.update(transitions(BOTH, seed=seed))
    tree = copy.deepcopy(agent.state_dict())
    other = small_agent(name, BOTH)
    other.update(transitions(BOTH, seed=9))
    other.load_state_dict(tree)
    for seed in range(3, 6):
        agent.update(transitions(BOTH, seed=seed))
        other.update(transitions(BOTH, seed=seed))
    for key, network in agent.networks().items():
        for tensor, value in network.state_dict().items():
            assert torch.equal(value, other.networks()[key].state_dict()[tensor]), (key, tensor)
    for mine, theirs in zip(agent.optimizers().values(), other.optimizers().values(), strict=True):
        for a, b in zip(mine.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)
    seen = observation(BOTH)
    assert np.array_equal(agent.act(seen, explore=True)[0], other.act(seen, explore=True)[0])


def test_the_same_seed_builds_the_same_agent_whatever_the_global_generator():
    torch.manual_seed(1)
    first = small_agent("sgqn", seed=3).critic.state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = small_agent("sgqn", seed=3).critic.state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_checkpoint_of_another_agent_is_refused_by_name():
    tree = small_agent("sgqn").state_dict()
    with pytest.raises(UserError, match="another agent"):
        small_agent("drqv2").load_state_dict(tree)
    tree = small_agent("drq", hidden=(16, 16)).state_dict()
    with pytest.raises(UserError, match=r"actor.*is \(.*in the checkpoint|critic.*is \("):
        small_agent("drq", hidden=(12, 16)).load_state_dict(tree)


def test_bf16_and_channels_last_stay_close_to_fp32():
    torch.manual_seed(0)
    losses = {}
    for precision, channels_last in (("fp32", False), ("fp32", True), ("bf16", True)):
        agent = small_agent("svea", precision=precision, channels_last=channels_last)
        losses[precision, channels_last] = agent.update(transitions())["loss/critic"].item()
    reference = losses["fp32", False]
    assert losses["fp32", True] == pytest.approx(reference, rel=1e-4)
    assert losses["bf16", True] == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("name", ["sgqn", "svea", "rad", "drqv2"])
def test_pictures_for_the_log_do_not_move_any_random_stream(name):
    agent = small_agent(name)
    before = agent.generator.get_state()
    pictures = agent.images(observation(), torch.zeros(8, 2))
    assert torch.equal(agent.generator.get_state(), before)
    assert all(p.dtype == np.uint8 and p.ndim == 3 for p in pictures.values())
    assert {"saliency", "augmentation"} <= pictures.keys()


def test_rad_acts_on_the_center_and_learns_from_crops():
    agent = small_agent("rad")
    assert agent.crop == 20
    agent.update(transitions())
    assert agent.act(observation(), explore=False)[0].shape == (8, 2)


def test_discrete_actions_are_refused_in_one_line():
    import gymnasium as gym

    from agents import make_agent

    with pytest.raises(UserError, match="continuous"):
        make_agent("sac", PIXELS, gym.spaces.Discrete(3))
    with pytest.raises(UserError, match="did you mean drqv2"):
        make_agent("drqv", PIXELS, ACTION)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("sac", "initial_temperature", 0.0),
        ("sac", "log_std_low", 3.0),
        ("drqv2", "noise_clip", -1.0),
        ("drqv2", "noise_start", float("nan")),
        ("drq", "critic_weight_decay", -1.0),
    ],
)
def test_impossible_settings_of_one_agent_are_refused(name, field, value):
    with pytest.raises(UserError, match=field):
        small_agent(name, **{field: value})


@pytest.mark.parametrize("name", ["drq", "drqv2"])
def test_scaled_rewards_are_learned_from_like_rewards_of_that_size(name):
    scaled, plain = small_agent(name, reward_scale=0.125), small_agent(name)
    for seed in range(3):
        batch = transitions(seed=seed)
        scaled.update(batch)
        plain.update(dataclasses.replace(batch, reward=batch.reward / 8))
    for ours, theirs in zip(scaled.actor.parameters(), plain.actor.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_pad_means_no_shift():
    agent = small_agent("drq", pad=0)
    seen = observation()
    assert torch.equal(agent.augment(seen)["pixels"], seen["pixels"])


@pytest.mark.parametrize("name", ["drqv2", "drqv2-svea", "drqv2-sgqn"])
def test_drqv2s_targets_are_computed_from_the_online_encoder(name):
    """Also where a method's auxiliary step moved the encoder after the averages."""
    agent = small_agent(name)
    for seed in range(2):
        agent.update(transitions(seed=seed))
    batch = transitions(seed=7)
    state = agent.generator.get_state()
    target = agent.target_value(batch)
    with torch.no_grad():
        for parameter in agent.target.encoder.parameters():
            parameter.zero_()
    agent.generator.set_state(state)
    assert torch.equal(agent.target_value(batch), target)


def test_methods_load_their_images_only_when_they_learn(tmp_path):
    agent = small_agent("svea", overlay_folder=str(tmp_path / "gone"))
    agent.act(observation(), explore=False)
    with pytest.raises(UserError, match="does not exist"):
        agent.update(transitions())


def test_a_random_stream_of_another_device_is_refused():
    agent = small_agent("sac")
    tree = agent.state_dict()
    tree["generator"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(UserError, match="another kind of device"):
        agent.load_state_dict(tree)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("discount", 1.5),
        ("n_step", -1),
        ("critic_tau", 0.0),
        ("reward_scale", 0.0),
        ("reward_scale", float("inf")),
        ("actor_learning_rate", float("inf")),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field):
        small_agent("sac", **{field: value})


def test_drqv2_shares_the_online_encoder_with_its_target():
    agent = small_agent("drqv2")
    agent.update(transitions())
    for online, target in zip(
        agent.critic.encoder.parameters(), agent.target.encoder.parameters(), strict=True
    ):
        assert torch.equal(online, target)


def test_agents_are_registered_once():
    from agents import register

    with pytest.raises(UserError, match="exists"):
        register("sac", AGENTS["sac"])
    assert ddpg.DDPGConfig().n_step == 3
