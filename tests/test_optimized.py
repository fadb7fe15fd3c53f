"Predictions by a copy of the network with folded norms: equal numbers, and a new copy whenever weights have changed"
from copy import copy, deepcopy
import numpy as np, pytest, torch
from torch import nn
from deepfid.data.synth import synthetic_face
from deepfid.inference.hub import load
from deepfid.models.base import NetworkDetector
from deepfid.models.deepfidelity.detector import DeepFidelity
from deepfid.models.deepfidelity.ssaa import MirrorMix
from deepfid.models.layers import fold_batch_norms
from deepfid.models.lisiam.detector import LiSiam
from deepfid.models.local_similarity.detector import LocalSimilarity

LITE0 = dict(deepfidelity=(DeepFidelity, dict(weights=None)), lisiam=(LiSiam, dict(pretrained=False)),
    local_similarity=(LocalSimilarity, dict(pretrained=False, backbone='efficientnet_lite0')))
MIRRORS = [[.7, -.7], [.8, .3]] # no shift can be folded into the first, whose weights sum to 0
FACES = [synthetic_face(seed, 64).image for seed in range(3)]

def with_random_norms(net):
    torch.manual_seed(0)
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for p, low, high in ((m.weight, .8, 1.2), (m.bias, -.2, .2), (m.running_mean, -.2, .2), (m.running_var, .8, 1.2)): nn.init.uniform_(p, low, high)
    return net

def made(name):
    cls, settings = LITE0[name]
    d = cls(size=64, **settings).configure('tiny', 'finetune')
    with_random_norms(d.model)
    if name=='deepfidelity': d.model.blocks[0][0].conv_dw.w.data, d.model.blocks[1][1].conv_dw.w.data = torch.tensor(MIRRORS)
    return d

@pytest.fixture(params=LITE0)
def detector(request): return made(request.param)

def unfolded(d):
    "Predictions and features by the network itself"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkDetector, 'folds_norms', False)
        assert d.optimized_model() is d.model
        return d.predict(FACES), d.features(FACES)

def check(d):
    assert d.folds_norms
    (want, features), got = unfolded(d), d.predict(FACES)
    np.testing.assert_allclose([p.fidelity for p in got], [p.fidelity for p in want], rtol=0, atol=1e-5)
    np.testing.assert_allclose(d.features(FACES), features, rtol=0, atol=1e-5*max(1, abs(features).max()))
    for name in ('mask', 'similarity'):
        a, b = ([getattr(p, name) for p in predictions] for predictions in (got, want))
        assert [m is None for m in a]==[m is None for m in b]
        if b[0] is not None: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    return [p.fidelity for p in got]

def norms(net): return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())

def test_folded_equals_unfolded(detector):
    before = {k: v.clone() for k, v in detector.model.state_dict().items()}
    check(detector)
    left = dict(deepfidelity=1, lisiam=1, local_similarity=0)[detector.name] # behind the first mirror mix; behind a sum
    assert norms(detector.optimized_model())==left and norms(detector.model)>20
    assert detector.optimized_model() is detector.optimized_model() and not detector.optimized_model().training
    assert all(torch.equal(v, before[k]) for k, v in detector.model.state_dict().items())
    assert (detector.predict(FACES)[0].similarity is not None)==(detector.name=='local_similarity')

def first_conv(d): return next(m for m in d.model.modules() if isinstance(m, nn.Conv2d))

def scale_in_place(d):
    with torch.no_grad(): first_conv(d).weight.mul_(1.5)
def scale_twice(d):
    for _ in range(2): first_conv(d).weight.data = first_conv(d).weight.data*1.5
def load_weights(d): d.model.load_state_dict({k: v*1.5 if k=='conv_stem.weight' else v.clone() for k, v in d.model.state_dict().items()})
def replace_network(d): d.model = deepcopy(d.model); scale_in_place(d)
def train_a_step(d):
    d.model.train()
    x = torch.randn(4, 3, 64, 64)
    out = d.model(x)
    optimizer = torch.optim.SGD(d.model.parameters(), lr=.1)
    (out if isinstance(out, torch.Tensor) else out.fidelity).square().mean().backward()
    optimizer.step()
def move_norms(d):
    d.model.train()
    with torch.no_grad():
        for _ in range(3): d.model(torch.randn(4, 3, 64, 64)*2+1)

@pytest.mark.parametrize('change', [scale_in_place, scale_twice, load_weights, replace_network, train_a_step, move_norms], ids=lambda f: f.__name__)
def test_changed_weights_are_seen(change):
    d = made('deepfidelity')
    before = check(d)
    change(d)
    after = check(d)
    assert max(abs(a-b) for a, b in zip(before, after))>1e-5

def test_fresh_weights_are_seen():
    d = made('deepfidelity')
    before = check(d)
    d.settings['seed'] = 1
    d.configure('tiny', 'finetune')
    assert not np.allclose(check(d), before, atol=1e-6, rtol=0)

def test_copies_have_their_own_form():
    d = made('deepfidelity')
    before, shared, own = check(d), copy(d), deepcopy(d)
    assert shared.optimized_model() is d.optimized_model() and own.optimized_model() is not d.optimized_model()
    scale_in_place(own)
    assert not np.allclose(check(own), before, atol=1e-6, rtol=0) and check(d)==before

def test_predictions_inside_inference_mode():
    with torch.inference_mode():
        d = made('lisiam')
        before = check(d)
        d.model.last.bias.add_(torch.tensor([1., 0.])) # inference tensors count no changes
        assert min(a-b for a, b in zip(check(d), before))>.01

@pytest.mark.parametrize('name', list(LITE0))
def test_networks_without_timms_norms_predict_as_they_are(name):
    d = load(name)
    assert d.folds_norms==any(type(m).__name__=='BatchNormAct2d' for m in d.model.modules())
    assert (d.optimized_model() is d.model)==(not d.folds_norms)
    x = LocalSimilarity(pretrained=False).configure('tiny')
    assert not x.folds_norms and x.optimized_model() is x.model

class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    def forward(self, x):
        x = self.conv(x)
        return x+self.norm(x)

class OneConvTwice(TwoReaders):
    def forward(self, x): return self.norm(self.conv(x))+self.conv(x)

@pytest.mark.parametrize('net', [TwoReaders(), OneConvTwice(), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
    nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True), nn.BatchNorm2d(4))],
    ids=['two readers', 'one convolution twice', 'norm first', 'no norm', 'changed in place'])
def test_what_cannot_be_folded_stays(net):
    net = with_random_norms(net.eval())
    assert fold_batch_norms(net, torch.randn(2, 3, 8, 8)) is net

@pytest.mark.parametrize('w', [(1., 0.), (.9, .2), (-.5, 2.), (.3, -.2), (.7, -.7), (0., 1.)])
@pytest.mark.parametrize('axis', [-1, -2])
def test_norms_behind_mirror_mixes(w, axis):
    "The last two stay: a shift is lost, or there is nothing to divide by"
    torch.manual_seed(0)
    mix = MirrorMix(nn.Conv2d(3, 3, 3, padding=1, groups=3), axis)
    net = with_random_norms(nn.Sequential(mix, nn.BatchNorm2d(3), nn.ReLU())).eval()
    net[0].w.data = torch.tensor(w)
    x = torch.randn(2, 3, 9, 9)
    folded = fold_batch_norms(net, x)
    assert norms(folded)==int(w in ((.7, -.7), (0., 1.)))
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-5)

def test_convolutions_with_bias_and_norms_without_weights():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)).double()
    for m in (net[1], net[4]):
        nn.init.uniform_(m.running_mean, -1, 1)
        nn.init.uniform_(m.running_var, .5, 2)
    x = torch.randn(2, 3, 9, 9).double()
    folded = fold_batch_norms(net.eval(), x)
    assert norms(folded)==0 and norms(net)==2
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-12)
