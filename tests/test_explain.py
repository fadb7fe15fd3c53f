"Maps of what a network looks at: right by hand, nothing left behind, scored against the truth"
import numpy as np, pytest, torch
from torch import nn
from deepfid.core import DeepfidError, Detector, Prediction
from deepfid.explain import (METHODS, cam_picture, detector_cam, disagreement, find_layer, fit_map, grad_cam, map_scores, neighbour_accuracy, occlusion,
    overlay, plot_tsne, randomised, tsne)
from deepfid.models.local_similarity.decoder import SimilarityNet

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
    for m in METHODS: assert not grad_cam(net, 'conv', x, 0, m).any()

@pytest.mark.parametrize('method', METHODS)
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

def test_networks_with_named_outputs():
    net, x = SimilarityNet('tiny'), torch.randn(2, 3, 64, 64)
    assert grad_cam(net, 'backbone.block12', x, lambda out: -out.logit).shape[0]==2

def test_a_function_as_layer(net, x):
    def look(model, x):
        a = model.conv(x)
        return a, model.head(a.mean((2, 3)))
    assert np.allclose(grad_cam(net, look, x, 0), grad_cam(net, 'conv', x, 0))

@pytest.mark.parametrize('call, says', [
    (lambda n, x: grad_cam(n, 'convv', x, 0), 'did you mean conv'), (lambda n, x: grad_cam(n, nn.Conv2d(3, 4, 1), x, 0), 'is no layer'),
    (lambda n, x: grad_cam(n, 'head', x, 0), 'no map'), (lambda n, x: grad_cam(n, 'conv', x[0], 0), 'batch'), (lambda n, x: grad_cam(n, 'conv', x, 7), 'knows 2 classes'),
    (lambda n, x: grad_cam(n, 'conv', x, 0, 'magic'), 'gradcam'), (lambda n, x: overlay(np.zeros((8, 8, 3), np.uint8), np.full((4, 4), 2.)), '0 to 1')])
def test_refused(net, x, call, says):
    with pytest.raises(DeepfidError, match=says): call(net, x)

class Corner(Detector):
    "Real where the upper left corner is dark"
    def predict(self, faces, batch_size=32): return [Prediction(1-np.asarray(getattr(f, 'image', f))[:4, :4].mean()/255) for f in faces]

def test_occlusion_finds_the_corner():
    face = np.zeros((16, 16, 3), np.uint8); face[:4, :4] = 255
    found = occlusion(Corner(), face, 4, 2, 'mean')
    assert np.unravel_index(found.argmax(), found.shape)[0]<4 and found[8:, 8:].max()==0 and found[:4, :4].mean()>.2
    with pytest.raises(DeepfidError, match='gap'): occlusion(Corner(), face, 4, 5)
    with pytest.raises(DeepfidError, match='no network'): detector_cam(Corner(), [face], 'x', 0)

def test_scores_of_maps():
    mask = np.zeros((2, 8, 8)); mask[:, :4] = 1
    inside, blind = mask.copy(), np.ones((2, 8, 8))
    s = map_scores(np.stack([inside[0], blind[1]]), mask)
    assert s.energy.tolist()==[1., .5] and s.hit.tolist()==[1., .5] and s.area.tolist()==[.5, .5]
    assert map_scores(1-inside, mask).energy.max()==0 and map_scores(0*blind, mask).energy.tolist()==[.5, .5]
    with pytest.raises(DeepfidError, match='empty'): map_scores(blind, 0*mask)

def test_a_network_that_forgot_gives_other_maps(net, x):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = randomised(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v.flatten().sort()[0], before[k].flatten().sort()[0]) for k, v in other.state_dict().items())
    a = grad_cam(net, 'conv', x, 0)
    assert disagreement(a, a).max()<1e-9 and disagreement(a, grad_cam(other, 'conv', x, 0)).mean()>.1
    assert find_layer(net, 'conv') is net.conv

def test_clouds_and_their_numbers():
    rng, labels = np.random.default_rng(0), np.repeat(['a', 'b'], 20)
    apart = rng.normal(size=(40, 6))+8*(labels=='b')[:, None]
    e = tsne(apart, labels)
    assert e.points.shape==(40, 2) and e.knn==1 and e.silhouette>.5 and e.chance==.5 and np.array_equal(tsne(apart, labels).points, e.points)
    assert tsne(rng.normal(size=(40, 6)), labels).knn<.8 and len(plot_tsne(e).get_legend().get_texts())==2
    for bad, says in ((np.full((40, 6), np.nan), 'finite'), (apart[:3], 'finite')):
        with pytest.raises(DeepfidError, match=says): tsne(bad, labels)
    with pytest.raises(DeepfidError, match='two classes'): tsne(apart, ['a']*40)

def test_ones_own_group_does_not_vote():
    z = np.repeat(np.random.default_rng(0).normal(size=(20, 5)), 2, 0)+.01*np.random.default_rng(1).normal(size=(40, 5))
    labels, who = np.repeat(np.random.default_rng(2).permutation(np.repeat([0, 1], 10)), 2), np.repeat(np.arange(20), 2)
    assert neighbour_accuracy(z, labels, 1)>neighbour_accuracy(z, labels, 1, who)

def test_pictures():
    im = np.zeros((8, 8, 3), np.uint8)
    assert np.array_equal(overlay(im+9, np.zeros((4, 4))), im+9) and cam_picture([im]*2, np.ones((2, 4, 4))).ndim==3 and fit_map(np.ones((2, 2)), (8, 8)).shape==(8, 8)
