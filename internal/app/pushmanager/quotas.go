package pushmanager

import (
	"context"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/quota"
)

// bindQuota is the section quota.
func bindQuota(c *quota.Config, s *config.Set) {
	s.Choice(&c.OnError, "quota.on_error", quota.Allow, "What happens to pushes of those with daily_pushes in the policy while etcd does not answer and what was fetched in advance is spent. With allow they pass until this instance alone has used up the day.",
		quota.Allow, quota.Deny)
}

// startQuotas makes the quotas, without limits. etcd may still be away.
func (m *PushManager) startQuotas(cfg Config) *quota.Set {
	cfg.Quotas.Client = cfg.Discovery.Client
	quotas := quota.New(cfg.Quotas)
	m.life.Add("quotas", app.WithTimeout(deregisterTimeout, func(ctx context.Context) error {
		quotas.Close(ctx)
		return nil
	}))
	return quotas
}
