"Synthetic faces: reproducible from a seed, exact landmarks, one camera for real and fake"
import numpy as np, pytest
from deepfid.core import DeepfidError, five_points
from deepfid.data.synth import camera_jpeg, camera_settings, sample_person, simulate_camera, simulate_sensor, synthetic_face

def test_same_seed_same_pixels_and_another_seed_another_face():
    a, b, c = synthetic_face(3, size=96), synthetic_face(3, size=96), synthetic_face(4, size=96)
    np.testing.assert_array_equal(a.image, b.image)
    assert np.abs(a.image.astype(int)-c.image).mean()>5

@pytest.mark.parametrize('size, seeds', [(64, 25), (112, 12), (224, 4)])
def test_landmarks_points_and_region(size, seeds):
    for seed in range(seeds):
        f = synthetic_face(seed, size=size)
        assert f.image.shape==(size, size, 3) and f.landmarks.shape==(68, 2) and f.consent and f.source=='synth'
        np.testing.assert_allclose(f.points, five_points(f.landmarks), atol=1e-4)
        assert f.points[0, 0]<f.points[1, 0] and f.points[3, 0]<f.points[4, 0]
        inside = np.r_[f.landmarks[36:60]].astype(int)
        assert (f.region[inside[:, 1], inside[:, 0]]>.5).all()

def test_landmarks_scale_with_the_image():
    a, b = synthetic_face(5, size=100), synthetic_face(5, size=200)
    np.testing.assert_allclose(2*a.landmarks, b.landmarks, atol=.01)

def test_one_identity_in_two_images():
    a, b = synthetic_face(1, identity=9), synthetic_face(2, identity=9)
    assert a.identity==b.identity=='drawn-9' and np.abs(a.image.astype(int)-b.image).mean()>5
    np.testing.assert_array_equal(sample_person(9).landmarks, sample_person(9).landmarks)

def test_traits_by_name_and_unknown_ones_refused():
    assert synthetic_face(1, yaw=.4).meta['yaw']==.4
    with pytest.raises(DeepfidError, match="trait='ears'.*'yaw'"): synthetic_face(1, ears=2)
    for size in (8, 2000, 64.5):
        with pytest.raises(DeepfidError, match='size'): synthetic_face(1, size=size)

def test_one_camera_seed_leaves_untouched_pixels_equal():
    real = synthetic_face(6, size=112).image
    fake = real.copy()
    fake[40:60, 40:60] = 255-fake[40:60, 40:60]
    a, b = (simulate_sensor(i, 11, blur=0., motion=0.).astype(int) for i in (real, fake))
    differ = np.abs(a-b).max(-1)
    assert differ[40:60, 40:60].mean()>1
    differ[40:60, 40:60] = 0
    assert differ.max()==0

def test_camera_is_seeded_and_varied():
    image = synthetic_face(7, size=112).image
    assert camera_jpeg(image, 1)==camera_jpeg(image, 1)!=camera_jpeg(image, 2)
    assert simulate_camera(image, 1).shape==image.shape
    settings = [camera_settings(s) for s in range(300)]
    assert min(s['quality'] for s in settings)<65 and max(s['noise'] for s in settings)>7 and any(s['motion'] for s in settings)

def test_seeds_and_images_are_checked():
    image = synthetic_face(1, size=64).image
    for seed in (-1, 1.5, 'x'):
        for make, args in ((synthetic_face, (seed, 64)), (synthetic_face, (1, 64, seed)), (camera_settings, (seed,)), (camera_jpeg, (image, seed))):
            with pytest.raises(DeepfidError, match='^(seed|identity)='): make(*args)
    for bad in (image/255, image[..., 0], image[:0], np.zeros((2000, 8, 3), np.uint8)):
        with pytest.raises(DeepfidError, match='^image: |^longer side='): simulate_camera(bad, 1)
