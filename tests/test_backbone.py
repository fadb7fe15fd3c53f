"Xception: timm's network, at every depth, at every size"
import pytest, timm, torch
from deepfid.models.backbones import STAGES, STRIDED, Xception, load_pretrained, xception
from deepfid.core import DeepfidError, WeightsError

TABLE = {299: (147, 74, 37, 19, 10, 10), 256: (125, 63, 32, 16, 8, 8), 224: (109, 55, 28, 14, 7, 7)} # act2, block1, block2, block3..11, block12, act4
WHERE = ('act2', 'block1', 'block2', 'block7', 'block12', 'act4')

def sides(size, **kw):
    net = Xception(width=.01, **kw).eval()
    with torch.no_grad(): return {k: v.shape[2] for k, v in net(torch.zeros(1, 3, size, size), STAGES[:STAGES.index(net.last)+1]).items()}

@pytest.mark.parametrize('size', TABLE)
def test_sides(size):
    found = sides(size)
    assert tuple(found[k] for k in WHERE)==TABLE[size] and len({found[f'block{i}'] for i in range(3, 12)})==1

@pytest.mark.parametrize('size, side', [(299, 149), (256, 127), (224, 111)])
def test_first_convolution_has_no_padding(size, side): assert Xception(width=.01).conv1(torch.zeros(1, 3, size, size)).shape[2]==side

@pytest.mark.parametrize('size, places', [(38, 1), (39, 4)])
def test_the_smallest_picture_that_is_taken_has_several_places_at_the_end(size, places, monkeypatch):
    if size<39:
        with pytest.raises(DeepfidError, match='39x39'): sides(size)
        monkeypatch.setattr('deepfid.models.backbones.LEAST', 1)
    assert sides(size)['act4']**2==places

def test_channels():
    with torch.device('meta'):
        net = Xception()
        out = net(torch.zeros(1, 3, 64, 64), STAGES)
    assert [out[k].shape[1] for k in WHERE]==[64, 128, 256, 728, 1024, 2048]

@pytest.mark.parametrize('destride, side', [((), 10), (('block3',), 19), (('block12',), 19), (('block3', 'block12'), 37)])
def test_destriding(destride, side): assert sides(299, destride=destride, last='block12')['block12']==side

def test_small_preset_gives_sixteen(): assert sides(128, destride=('block3', 'block12'), last='block12')['block12']==16 and sides(128)['block7']==8

@pytest.fixture(scope='module')
def theirs():
    torch.manual_seed(0)
    return timm.create_model('legacy_xception', num_classes=0).eval()

@pytest.mark.parametrize('destride', [(), ('block3', 'block12')])
def test_timm_weights_fit_whatever_the_strides(theirs, destride):
    net = Xception(destride=destride).eval()
    net.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x, ['block2'])['block2'].relu(), theirs.forward_intermediates(x, intermediates_only=True)[2], atol=1e-4, rtol=1e-4)
        assert net(x).shape[-1]==(8 if destride else theirs.forward_features(x).shape[-1])

def test_every_depth_is_timms(theirs):
    net, x = Xception().eval(), torch.randn(2, 3, 75, 75)
    net.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for stage, m in zip(('act2', 'block1', 'block2', 'block11', 'act4'), maps): torch.testing.assert_close(net(x, [stage])[stage].relu(), m, atol=1e-4, rtol=1e-4)

def test_a_tap_is_not_changed_by_what_follows():
    net, x = Xception(width=.1).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        alone, together = {s: net(x, [s])[s] for s in STAGES}, net(x, STAGES)
    for s in STAGES: assert torch.equal(alone[s], together[s]), s

def test_packaged_weights_of_the_slim_network():
    net, whole = xception('tiny', pretrained=True, destride=('block3', 'block12'), last='block12'), xception('tiny', pretrained=True)
    fresh = xception('tiny')
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in net.state_dict().items())
    assert not torch.equal(fresh.conv1.weight, whole.conv1.weight) and all(v.isfinite().all() for v in whole.state_dict().values())

def test_what_is_not_wanted_is_not_built():
    net = Xception(width=.1, last='block7')
    assert not hasattr(net, 'block8') and not hasattr(net, 'conv3')

def test_imagenet_weights(monkeypatch, theirs):
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: theirs)
    assert torch.equal(xception('full', pretrained=True).conv1.weight, theirs.conv1.weight)
    with pytest.raises(WeightsError, match='full width'): load_pretrained(Xception(width=.5))
    def offline(*a, **k): raise ConnectionError
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(WeightsError, match='could not be fetched'): load_pretrained(Xception())

@pytest.mark.parametrize('make, says', [(lambda: Xception(last='fc'), 'choose one of'), (lambda: Xception(destride=('block4',)), 'does not halve'),
    (lambda: Xception(width=.1)(torch.zeros(1, 3, 20, 64)), 'at least 39x39'), (lambda: Xception(width=.1)(torch.zeros(3, 64, 64)), 'batch'),
    (lambda: Xception(width=.1, last='block2')(torch.zeros(1, 3, 64, 64), ['block3']), "no stage 'block3'"), (lambda: xception('huge'), "'tiny'")])
def test_refused(make, says):
    with pytest.raises(DeepfidError, match=says): make()
