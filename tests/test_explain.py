"Grad-CAM and occlusion maps: equal to the formula, without side effects, scored against masks; t-SNE"
from typing import NamedTuple
import numpy as np, pytest, torch
from torch import nn
from deepfid.core import DeepfidError, Detector, Prediction
from deepfid.explain import CAM_METHODS, cam_grid, detector_grad_cam, map_dissimilarity, find_layer, resize_map, grad_cam, localization_scores, knn_accuracy, occlusion_map, overlay_heatmap, plot_tsne, randomize_weights, tsne

class Net(nn.Module):
    "One convolution, the mean of each channel, one linear layer"
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.conv(x).mean((2, 3)))

@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()

@pytest.fixture
def x(): return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('method', ['gradcam', 'hirescam'])
def test_is_cam_for_a_linear_head_over_means(net, x, method):
    want = torch.einsum('c,bchw->bhw', net.head.weight[0]/64, net.conv(x)).relu().detach().numpy()
    assert np.allclose(grad_cam(net, 'conv', x, 0, method, normalise=False), want, atol=1e-6)

def test_no_evidence_no_map(net, x):
    with torch.no_grad(): net.head.weight[0] = 0
    for m in CAM_METHODS: assert not grad_cam(net, 'conv', x, 0, m).any()

@pytest.mark.parametrize('method', CAM_METHODS)
def test_nothing_is_left_behind(net, x, method):
    net.train()
    for p in net.parameters(): p.requires_grad_(p is net.head.weight)
    with torch.inference_mode(): a = grad_cam(net, net.conv, x, 1, method)
    assert net.training and net.conv.training and not net.conv._forward_hooks and all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()]==[p is net.head.weight for p in net.parameters()]
    assert a.shape==(3, 8, 8) and a.min()>=0 and a.max()<=1

def test_hooks_go_even_when_the_score_fails(net, x):
    with pytest.raises(DeepfidError): grad_cam(net, 'conv', x, lambda out: out)
    assert not net.conv._forward_hooks

def test_upsampled(net, x): assert grad_cam(nn.Sequential(nn.AvgPool2d(2), net), '1.conv', x, 0, upsample=True).shape==(3, 8, 8)

class Output(NamedTuple):
    logit: torch.Tensor
    mask: torch.Tensor

class NamedNet(Net):
    def forward(self, x): return Output(super().forward(x)[:, 1], x)

def test_networks_with_named_outputs(net, x):
    named = NamedNet()
    named.load_state_dict(net.state_dict())
    assert np.allclose(grad_cam(named, 'conv', x, lambda out: out.logit), grad_cam(net, 'conv', x, 1))
    with pytest.raises(DeepfidError, match='this output has Output'): grad_cam(named, 'conv', x, 0)

def test_a_function_as_layer(net, x):
    def look(model, x):
        a = model.conv(x)
        return a, model.head(a.mean((2, 3)))
    assert np.allclose(grad_cam(net, look, x, 0), grad_cam(net, 'conv', x, 0))

@pytest.mark.parametrize('call, message', [
    (lambda n, x: grad_cam(n, 'convv', x, 0), 'such as conv'), (lambda n, x: grad_cam(n, nn.Conv2d(3, 4, 1), x, 0), 'no layer'),
    (lambda n, x: grad_cam(n, 'head', x, 0), 'no map'), (lambda n, x: grad_cam(n, 'conv', x[0], 0), 'batch'), (lambda n, x: grad_cam(n, 'conv', x, 7), '2 classes'),
    (lambda n, x: grad_cam(n, 'conv', x, 0, 'magic'), 'gradcam'), (lambda n, x: overlay_heatmap(np.zeros((8, 8, 3), np.uint8), np.full((4, 4), 2.)), '0 to 1')])
def test_errors(net, x, call, message):
    with pytest.raises(DeepfidError, match=message): call(net, x)

class Corner(Detector):
    "Real where the upper left corner is dark"
    def predict(self, faces, batch_size=32): return [Prediction(1-np.asarray(getattr(f, 'image', f))[:4, :4].mean()/255) for f in faces]

def test_occlusion_finds_the_corner():
    face = np.zeros((16, 16, 3), np.uint8); face[:4, :4] = 255
    found = occlusion_map(Corner(), face, 4, 2, 'mean')
    assert np.unravel_index(found.argmax(), found.shape)[0]<4 and found[8:, 8:].max()==0 and found[:4, :4].mean()>.2
    with pytest.raises(DeepfidError, match='gap'): occlusion_map(Corner(), face, 4, 5)
    with pytest.raises(DeepfidError, match='not trained'): detector_grad_cam(Corner(), [face], 'x', 0)

def test_localization_scores():
    mask = np.zeros((2, 8, 8)); mask[:, :4] = 1
    inside, constant = mask.copy(), np.ones((2, 8, 8))
    s = localization_scores(np.stack([inside[0], constant[1]]), mask)
    assert s.energy.tolist()==[1., .5] and s.pointing_game.tolist()==[1., .5] and s.area.tolist()==[.5, .5]
    assert localization_scores(1-inside, mask).energy.max()==0 and localization_scores(0*constant, mask).energy.tolist()==[.5, .5]
    with pytest.raises(DeepfidError, match='empty'): localization_scores(constant, 0*mask)

def test_randomized_weights_give_other_maps(net, x):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = randomize_weights(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v.flatten().sort()[0], before[k].flatten().sort()[0]) for k, v in other.state_dict().items())
    a = grad_cam(net, 'conv', x, 0)
    assert map_dissimilarity(a, a).max()<1e-9 and map_dissimilarity(a, grad_cam(other, 'conv', x, 0)).mean()>.1
    assert find_layer(net, 'conv') is net.conv

def test_tsne_and_its_numbers():
    rng, labels = np.random.default_rng(0), np.repeat(['a', 'b'], 20)
    apart = rng.normal(size=(40, 6))+8*(labels=='b')[:, None]
    e = tsne(apart, labels)
    assert e.points.shape==(40, 2) and e.knn==1 and e.silhouette>.5 and e.chance==.5
    assert knn_accuracy(rng.normal(size=(40, 6)), labels)<.8 and len(plot_tsne(e).get_legend().get_texts())==2
    for bad, message in ((np.full((40, 6), np.nan), 'NaN'), (apart[:3], 'shape')):
        with pytest.raises(DeepfidError, match=message): tsne(bad, labels)
    with pytest.raises(DeepfidError, match='two classes'): tsne(apart, ['a']*40)

def test_neighbours_of_the_same_group_do_not_count():
    z = np.repeat(np.random.default_rng(0).normal(size=(20, 5)), 2, 0)+.01*np.random.default_rng(1).normal(size=(40, 5))
    labels, person = np.repeat(np.random.default_rng(2).permutation(np.repeat([0, 1], 10)), 2), np.repeat(np.arange(20), 2)
    assert knn_accuracy(z, labels, 1)>knn_accuracy(z, labels, 1, person)

def test_overlays():
    im = np.zeros((8, 8, 3), np.uint8)
    assert np.array_equal(overlay_heatmap(im+9, np.zeros((4, 4))), im+9) and cam_grid([im]*2, np.ones((2, 4, 4))).ndim==3 and resize_map(np.ones((2, 2)), (8, 8)).shape==(8, 8)
