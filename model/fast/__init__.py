"""Fast twins: the same results as the plain functions in model/, with hand-written gradients. Tests compare each pair.

fast twin                                    plain twin
nested_linear.nested_linear                  model.fmrl.nested_linear_plain
recurrence.linear_recurrence                 model.lru.linear_recurrence_plain
cross_entropy.cross_entropy_sum              model.loss.matryoshka_cross_entropy_plain
sampled_cross_entropy.sampled_cross_entropy_sum
                                             model.extensions.sampled_loss.sampled_matryoshka_cross_entropy_plain
"""
