//! L-BFGS (Nocedal 1980; Liu and Nocedal 1989) with a backtracking line search:
//! for a smooth, strictly convex function the result does not depend on where
//! it starts, which is all that the heads need.

/// Steps and gradients remembered.
const MEMORY: usize = 10;
/// Most steps; a head's loss needs some dozens.
const STEPS: usize = 500;
/// The gradient's largest entry at which it is done.
const TOLERANCE: f64 = 1e-7;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// A minimum of `f` near `x`. `f` gives the value and writes the gradient.
pub(super) fn minimize(mut x: Vec<f64>, f: impl Fn(&[f64], &mut [f64]) -> f64) -> Vec<f64> {
    let n = x.len();
    let mut gradient = vec![0.0; n];
    let mut value = f(&x, &mut gradient);
    // (step, change of gradient, 1 / their product), oldest first.
    let mut past: Vec<(Vec<f64>, Vec<f64>, f64)> = Vec::new();
    for _ in 0..STEPS {
        if gradient.iter().all(|g| g.abs() <= TOLERANCE) {
            break;
        }
        // The two-loop recursion: the inverse Hessian times the gradient.
        let mut direction = gradient.clone();
        let mut alphas = Vec::with_capacity(past.len());
        for (s, y, rho) in past.iter().rev() {
            let alpha = rho * dot(s, &direction);
            direction.iter_mut().zip(y).for_each(|(d, y)| *d -= alpha * y);
            alphas.push(alpha);
        }
        let scale = past.last().map_or_else(
            || 1.0 / dot(&gradient, &gradient).sqrt().max(1.0),
            |(_, y, rho)| 1.0 / (rho * dot(y, y)),
        );
        direction.iter_mut().for_each(|d| *d *= scale);
        for ((s, y, rho), alpha) in past.iter().zip(alphas.iter().rev()) {
            let beta = rho * dot(y, &direction);
            direction.iter_mut().zip(s).for_each(|(d, s)| *d += (alpha - beta) * s);
        }
        let slope = dot(&gradient, &direction);
        // Halve the step until the value falls as Armijo asks.
        let (mut step, mut next, mut next_gradient) = (1.0, x.clone(), vec![0.0; n]);
        let next_value = loop {
            next.iter_mut().zip(x.iter().zip(&direction)).for_each(|(n, (x, d))| *n = x - step * d);
            let v = f(&next, &mut next_gradient);
            if v <= value - 1e-4 * step * slope {
                break Some(v);
            }
            step *= 0.5;
            if step < 1e-12 {
                break None;
            }
        };
        // No lower value to be found in floating point: this is the minimum.
        let Some(next_value) = next_value else { break };
        let s: Vec<f64> = next.iter().zip(&x).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = next_gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let product = dot(&s, &y);
        if product > 1e-12 {
            if past.len() == MEMORY {
                past.remove(0);
            }
            past.push((s, y, 1.0 / product));
        }
        (x, gradient, value) = (next, next_gradient, next_value);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bent_valley_ends_at_its_known_minimum() {
        // Rosenbrock's function: not convex, and a straight descent crawls.
        let x = minimize(vec![-1.2, 1.0], |x, g| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            (g[0], g[1]) = (-2.0 * a - 400.0 * x[0] * b, 200.0 * b);
            a * a + 100.0 * b * b
        });
        assert!((x[0] - 1.0).abs() < 1e-5 && (x[1] - 1.0).abs() < 1e-5, "{x:?}");
    }
}
